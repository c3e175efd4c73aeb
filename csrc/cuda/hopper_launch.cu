/* Whether and how a Hopper kernel runs: the tables of its shapes, and tensors described for the copy engine. */
#include "hopper_backward_kernel.cuh"
#include "hopper_kernel.cuh"
#include "host.cuh"

/* Of those that serve where the keys lie, the smallest tile that holds the rows, else the largest. */
const HopperKernel *find_hopper_kernel(const fad_attn_problem *p, int64_t rows) {
    const bool bf16 = p->dtype == FAD_BFLOAT16;
    const HopperKernels tables[] = {bf16 ? hopper_decode_bf16() : hopper_decode_fp16(),
                                    bf16 ? hopper_tile_bf16() : hopper_tile_fp16()};
    const int64_t dims = max(p->D, p->Dv);
    const HopperKernel *best = nullptr;
    for (const HopperKernels &table : tables)
        for (const HopperKernel *k = table.begin; k < table.end; k++) {
            const bool narrowest = k->shape.dims >= dims && (k->shape.dims == 64 || k->shape.dims / 2 < dims),
                       serves = p->block_table ? k->pages : k->rows;
            if (narrowest && serves && (!best || best->shape.rows < rows))
                best = k;
        }
    return best;
}

/* The driver's function, found at run time: this library is not linked against it. */
typedef CUresult (*EncodeTiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
static EncodeTiled encoder() {
    static const EncodeTiled found = [] {
        void *function = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? (EncodeTiled)function : nullptr;
    }();
    return found;
}

/* Boxes of some rows by 64 dims of a view [entries, rows, heads, dims], swizzled by their width of 128 bytes, zeros
 * outside the buffer. False where the copy engine cannot address it. */
static bool describe(fad_dtype dtype, const fad_view &view, int64_t entries, int64_t rows, int64_t heads, int64_t dims,
                     int box_rows, CUtensorMap *map) {
    const cuuint64_t sizes[4] = {(cuuint64_t)dims, (cuuint64_t)rows, (cuuint64_t)heads, (cuuint64_t)entries};
    const int64_t strides[3] = {view.stride_s, view.stride_h, view.stride_b};
    cuuint64_t bytes[3];
    const cuuint32_t box[4] = {64, (cuuint32_t)box_rows, 1, 1}, steps[4] = {1, 1, 1, 1};
    for (int i = 0; i < 3; i++) {
        if (sizes[i + 1] > 1 && (strides[i] <= 0 || strides[i] >= INT64_C(1) << 39))
            return false;
        bytes[i] = sizes[i + 1] > 1 ? (cuuint64_t)strides[i] * 2 : 16; /* of one row, one head: not used */
    }
    for (int i = 0; i < 4; i++)
        if (sizes[i] == 0 || sizes[i] > INT32_MAX)
            return false;
    return encoder() &&
           encoder()(map, dtype == FAD_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
                     view.data, sizes, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

static bool describe_keys(const fad_attn_problem *p, int box, CUtensorMap *k, CUtensorMap *v) {
    const int64_t entries = fad_cache_entries(p), rows = p->block_table ? p->page_size : p->Sk;
    return describe(p->dtype, p->k, entries, rows, p->Hk, p->D, box, k) &&
           describe(p->dtype, p->v, entries, rows, p->Hk, p->Dv, box, v);
}

bool describe_keys(const fad_attn_problem *p, const HopperKernel &kernel, CUtensorMap *k, CUtensorMap *v) {
    if (p->block_table && !pages_by_engine(*p, kernel))
        return false;
    return describe_keys(p, box_rows(*p, kernel.box_keys), k, v);
}

/* The kernel of the call's head dims. */
template <class Tiles>
static const HopperBackwardKernel<Tiles> *find_backward(const fad_attn_problem *p,
                                                        const HopperBackwardKernels<Tiles> &table) {
    const int64_t dims = max(p->D, p->Dv);
    for (const HopperBackwardKernel<Tiles> *k = table.begin; k < table.end; k++)
        if (k->dims >= dims)
            return k;
    return nullptr;
}

bool plan_hopper_backward(const fad_attn_problem *p, const fad_view &dout, HopperBackwardPlan *plan) {
    const bool bf16 = p->dtype == FAD_BFLOAT16;
    const int64_t entries = p->cu_seqlens_q ? 1 : p->B;
    plan->keys = find_backward(p, bf16 ? hopper_backward_keys_bf16() : hopper_backward_keys_fp16());
    plan->rows = find_backward(p, bf16 ? hopper_backward_rows_bf16() : hopper_backward_rows_fp16());
    return plan->keys && plan->rows && describe_keys(p, plan->rows->box_rows, &plan->k, &plan->v) &&
           describe(p->dtype, p->q, entries, p->Sq, p->Hq, p->D, plan->keys->box_rows, &plan->q) &&
           describe(p->dtype, dout, entries, p->Sq, p->Hq, p->Dv, plan->keys->box_rows, &plan->dout);
}
