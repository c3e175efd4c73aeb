/* The vector operations on a single value, over the scalar ones of real.h: see vec_avx512.h for what each means. */
static inline vreal v_set(real x) { return x; }
static inline vreal v_load(const real *p) { return *p; }
static inline void v_store(real *p, vreal x) { *p = x; }
static inline vreal v_iota(void) { return 0; }
static inline vreal v_add(vreal a, vreal b) { return REAL(add)(a, b); }
static inline vreal v_sub(vreal a, vreal b) { return REAL(sub)(a, b); }
static inline vreal v_mul(vreal a, vreal b) { return REAL(mul)(a, b); }
static inline vreal v_div(vreal a, vreal b) { return REAL(div)(a, b); }
static inline vreal v_fma(vreal a, vreal b, vreal c) { return REAL(fma)(a, b, c); }
static inline vreal v_max(vreal candidate, vreal running) { return REAL(max)(candidate, running); }
static inline vreal v_abs(vreal x) { return REAL(abs)(x); }
static inline vreal v_copysign(vreal x, vreal sign) { return REAL(copysign)(x, sign); }
static inline vreal v_rint(vreal x) { return REAL(rint)(x); }
static inline vreal v_select_lt(vreal a, vreal b, vreal yes, vreal no) { return REAL(select_lt)(a, b, yes, no); }
static inline vreal v_scale2(vreal z) { return REAL(scale2)(z); }
static inline vreal v_canonical(vreal x) { return REAL(canonical)(x); }
static inline int v_any_lt(vreal a, vreal b) { return a < b; }
static inline int v_any_nan(vreal x) { return x != x; }
static inline real v_max_lanes(vreal x) { return x; }
static inline void v_transpose(vreal *rows) { (void)rows; }
