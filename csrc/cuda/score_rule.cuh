/* N5: how a score comes from a dot product; the same for a whole call. */
#ifndef FAD_CUDA_SCORE_RULE_CUH
#define FAD_CUDA_SCORE_RULE_CUH

#include "../core/sequence.h"

struct ScoreRule {
    float c, scaled, softcap;
    int plain;
    bool alibi;
    __host__ __device__ explicit ScoreRule(const fad_attn_problem &p)
        : scaled((float)(p.softcap > 0 ? p.scale / p.softcap : p.scale)), softcap((float)p.softcap),
          alibi(p.alibi_slopes != nullptr) {
        c = fad_f32_score_factor(p.scale, p.softcap > 0 || alibi, &plain);
    }
};

#endif
