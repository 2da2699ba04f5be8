// Row movements of the masked decoder; the definitions are in kernels/masked_rows.py.
// Every output row is written by one thread in a fixed order, so results do not depend on the number of threads.
#include "rows.h"

#include <algorithm>
#include <vector>

namespace omniid {

enum Status : int { kFine = 0, kOutOfRange = 1, kTwice = 2 };

// For each of `num_rows` rows of every sample the place in `index` (num_samples, num_indices) that names it, or -1.
static Status places(const int64_t* index, int64_t num_samples, int64_t num_rows, int64_t num_indices,
                     std::vector<int32_t>& found) {
    found.assign(static_cast<size_t>(num_samples * num_rows), -1);
    for (int64_t s = 0; s < num_samples; ++s) {
        int32_t* row = found.data() + s * num_rows;
        for (int64_t i = 0; i < num_indices; ++i) {
            const int64_t n = index[s * num_indices + i];
            if (n < 0 || n >= num_rows) return kOutOfRange;
            if (row[n] >= 0) return kTwice;
            row[n] = static_cast<int32_t>(i);
        }
    }
    return kFine;
}

// out[i] = sum over the list of rows, in its order, in fp32.
template <typename T>
OMNIID_INLINE void sum_rows(const T* const* rows, int64_t count, int64_t width, T* out) {
    constexpr int64_t kTile = 64;
    for (int64_t start = 0; start < width; start += kTile) {
        const int64_t size = std::min(kTile, width - start);
        float sum[kTile] = {};
        for (int64_t r = 0; r < count; ++r) {
            const T* row = rows[r] + start;
            if (size == kTile) {
                for (int64_t i = 0; i < kTile; ++i) sum[i] += widen(row[i]);
            } else {
                for (int64_t i = 0; i < size; ++i) sum[i] += widen(row[i]);
            }
        }
        for (int64_t i = 0; i < size; ++i) narrow(sum[i], out + start + i);
    }
}

OMNIID_VERSIONS void sum_rows_f32(const float* const* rows, int64_t count, int64_t width, float* out) {
    sum_rows(rows, count, width, out);
}
OMNIID_VERSIONS void sum_rows_bf16(const Bf16* const* rows, int64_t count, int64_t width, Bf16* out) {
    sum_rows(rows, count, width, out);
}

static void sum_list(const float* const* rows, int64_t count, int64_t width, float* out) {
    sum_rows_f32(rows, count, width, out);
}
static void sum_list(const Bf16* const* rows, int64_t count, int64_t width, Bf16* out) {
    sum_rows_bf16(rows, count, width, out);
}

template <typename T>
static int spread_rows_backward(const T* grad, int64_t sample_stride, int64_t row_stride, int64_t head_stride,
                                const int64_t* visible, int64_t num_identities, int64_t num_targets,
                                int64_t num_patches, int64_t num_visible, int64_t num_heads, int64_t head_size,
                                T* out, int64_t num_threads) {
    std::vector<int32_t> shown;
    const Status status = places(visible, num_identities * num_targets, num_patches, num_visible, shown);
    if (status != kFine) return status;
    const int64_t width = num_heads * head_size;
    const int64_t unique_rows = num_patches + num_targets * num_visible;
#pragma omp parallel num_threads(static_cast<int>(num_threads))
    {
        std::vector<const T*> list(static_cast<size_t>(num_targets));
#pragma omp for schedule(static)
        for (int64_t work = 0; work < num_identities * num_patches; ++work) {
            const int64_t b = work / num_patches, n = work % num_patches;
            T* masked = out + (b * unique_rows + n) * width;
            int64_t count = 0;
            for (int64_t t = 0; t < num_targets; ++t) {
                const int64_t s = b * num_targets + t;
                const T* row = grad + s * sample_stride + n * row_stride;
                const int32_t v = shown[static_cast<size_t>(s * num_patches + n)];
                if (v < 0) {
                    list[static_cast<size_t>(count++)] = row;
                    continue;
                }
                T* seen = out + (b * unique_rows + num_patches + t * num_visible + v) * width;
                for (int64_t h = 0; h < num_heads; ++h)
                    std::memcpy(seen + h * head_size, row + h * head_stride, sizeof(T) * head_size);
            }
            for (int64_t h = 0; h < num_heads; ++h) {
                sum_list(list.data(), count, head_size, masked + h * head_size);
                for (int64_t i = 0; i < count; ++i) list[static_cast<size_t>(i)] += head_stride;
            }
        }
    }
    return kFine;
}

}  // namespace omniid

using namespace omniid;

// rows     (num_identities, num_patches + num_targets * num_visible, num_heads, head_bytes), strides in bytes
// visible  (num_identities, num_targets, num_visible), distinct within a target
// out      (num_identities * num_targets, num_patches, num_heads, head_bytes), strides in bytes
// Returns 0, 1 when an index is out of range, 2 when a target names a patch twice; so do the other functions.
extern "C" int omniid_spread_rows(const char* rows, int64_t batch_stride, int64_t row_stride, int64_t head_stride,
                                  const int64_t* visible, int64_t num_identities, int64_t num_targets,
                                  int64_t num_patches, int64_t num_visible, int64_t num_heads, int64_t head_bytes,
                                  char* out, int64_t out_sample_stride, int64_t out_row_stride,
                                  int64_t out_head_stride, int64_t num_threads) {
    std::vector<int32_t> shown;
    const Status status = places(visible, num_identities * num_targets, num_patches, num_visible, shown);
    if (status != kFine) return status;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(num_threads))
    for (int64_t s = 0; s < num_identities * num_targets; ++s) {
        const char* masked = rows + s / num_targets * batch_stride;
        const char* seen = masked + (num_patches + s % num_targets * num_visible) * row_stride;
        const int32_t* of_sample = shown.data() + s * num_patches;
        char* to = out + s * out_sample_stride;
        for (int64_t h = 0; h < num_heads; ++h) {
            for (int64_t n = 0; n < num_patches; ++n) {
                const char* from = of_sample[n] < 0 ? masked + n * row_stride : seen + of_sample[n] * row_stride;
                std::memcpy(to + n * out_row_stride + h * out_head_stride, from + h * head_stride,
                            static_cast<size_t>(head_bytes));
            }
        }
    }
    return kFine;
}

// grad  (num_identities * num_targets, num_patches, num_heads, head_size), strides in values
// out   (num_identities, num_patches + num_targets * num_visible, num_heads, head_size) contiguous
extern "C" int omniid_spread_rows_backward_f32(const float* grad, int64_t sample_stride, int64_t row_stride,
                                               int64_t head_stride, const int64_t* visible, int64_t num_identities,
                                               int64_t num_targets, int64_t num_patches, int64_t num_visible,
                                               int64_t num_heads, int64_t head_size, float* out,
                                               int64_t num_threads) {
    return spread_rows_backward(grad, sample_stride, row_stride, head_stride, visible, num_identities, num_targets,
                                num_patches, num_visible, num_heads, head_size, out, num_threads);
}

extern "C" int omniid_spread_rows_backward_bf16(const Bf16* grad, int64_t sample_stride, int64_t row_stride,
                                                int64_t head_stride, const int64_t* visible, int64_t num_identities,
                                                int64_t num_targets, int64_t num_patches, int64_t num_visible,
                                                int64_t num_heads, int64_t head_size, Bf16* out,
                                                int64_t num_threads) {
    return spread_rows_backward(grad, sample_stride, row_stride, head_stride, visible, num_identities, num_targets,
                                num_patches, num_visible, num_heads, head_size, out, num_threads);
}

// rows  (num_samples, num_rows, row_bytes), strides in bytes
// index (num_samples, num_indices), distinct within a sample
// out   (num_samples, num_indices, row_bytes) contiguous
extern "C" int omniid_pick_rows(const char* rows, int64_t sample_stride, int64_t row_stride, const int64_t* index,
                                int64_t num_samples, int64_t num_rows, int64_t num_indices, int64_t row_bytes,
                                char* out, int64_t num_threads) {
    std::vector<int32_t> found;
    const Status status = places(index, num_samples, num_rows, num_indices, found);
    if (status != kFine) return status;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(num_threads))
    for (int64_t work = 0; work < num_samples * num_indices; ++work)
        std::memcpy(out + work * row_bytes, rows + work / num_indices * sample_stride + index[work] * row_stride,
                    static_cast<size_t>(row_bytes));
    return kFine;
}

// The reverse: picked (num_samples, num_indices, row_bytes), strides in bytes, to
// out (num_samples, num_rows, row_bytes) contiguous, zero where no index points.
extern "C" int omniid_place_rows(const char* picked, int64_t sample_stride, int64_t row_stride, const int64_t* index,
                                 int64_t num_samples, int64_t num_rows, int64_t num_indices, int64_t row_bytes,
                                 char* out, int64_t num_threads) {
    std::vector<int32_t> found;
    const Status status = places(index, num_samples, num_rows, num_indices, found);
    if (status != kFine) return status;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(num_threads))
    for (int64_t work = 0; work < num_samples * num_rows; ++work) {
        const int32_t i = found[static_cast<size_t>(work)];
        char* to = out + work * row_bytes;
        if (i < 0) {
            std::memset(to, 0, static_cast<size_t>(row_bytes));
        } else {
            std::memcpy(to, picked + work / num_rows * sample_stride + i * row_stride,
                        static_cast<size_t>(row_bytes));
        }
    }
    return kFine;
}
