"""The commands behind ``flash-attn-det``: verify, bench and info. Nothing in the library imports them."""
