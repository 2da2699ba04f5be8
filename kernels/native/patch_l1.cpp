// What patch_l1 does around its matrix products; the definition is in kernels/patch_l1.py.
// Every row is handled by one thread and its error summed in fixed lanes: the number of threads changes nothing.
#include "rows.h"

#include <cmath>

namespace omniid {

constexpr int64_t kLanes = 64;

OMNIID_VERSIONS int64_t count_set(const uint8_t* mask, int64_t size) {
    int64_t total = 0;
    for (int64_t start = 0; start < size; start += kLanes) {  // short runs: the compiler keeps them in narrow lanes
        const int64_t stop = start + kLanes < size ? start + kLanes : size;
        int32_t part = 0;
        for (int64_t i = start; i < stop; ++i) part += mask[i];
        total += part;
    }
    return total;
}

// `size` <= kLanes values: errors added to their lanes, signs of the differences written.
// Signs come from the bits: comparisons of floats may raise a flag, which keeps the compiler from using vectors.
template <typename T, typename X>
OMNIID_INLINE void row_piece(const T* __restrict predicted, const X* __restrict pixels, const uint8_t* __restrict mask,
                             int64_t size, float* __restrict lanes, int8_t* __restrict signs) {
    float difference[kLanes];
    int32_t sign[kLanes];
    for (int64_t i = 0; i < size; ++i) difference[i] = widen(predicted[i]) - widen(pixels[i]);
    for (int64_t i = 0; i < size; ++i) lanes[i] += mask[i] ? std::fabs(difference[i]) : 0.0f;
    for (int64_t i = 0; i < size; ++i) {
        int32_t bits;
        std::memcpy(&bits, difference + i, sizeof bits);
        const int32_t magnitude = bits & 0x7fffffff;
        const int32_t number = magnitude > 0x7f800000 ? 0 : (bits >> 31) | 1;  // 0 for NaN, as torch has it
        sign[i] = magnitude == 0 ? 0 : number;
    }
    for (int64_t i = 0; i < size; ++i) signs[i] = static_cast<int8_t>(sign[i] & -static_cast<int32_t>(mask[i]));
}

template <typename T, typename X>
OMNIID_INLINE float row_error(const T* predicted, const X* pixels, const uint8_t* mask, int64_t size, int8_t* signs) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) row_piece(predicted + i, pixels + i, mask + i, kLanes, lanes, signs + i);
    if (i < size) row_piece(predicted + i, pixels + i, mask + i, size - i, lanes, signs + i);
    for (int64_t width = kLanes / 2; width > 0; width /= 2)
        for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    return lanes[0];
}

OMNIID_VERSIONS float row_error_of(const float* p, const float* x, const uint8_t* m, int64_t n, int8_t* s) {
    return row_error(p, x, m, n, s);
}
OMNIID_VERSIONS float row_error_of(const float* p, const Bf16* x, const uint8_t* m, int64_t n, int8_t* s) {
    return row_error(p, x, m, n, s);
}
OMNIID_VERSIONS float row_error_of(const Bf16* p, const float* x, const uint8_t* m, int64_t n, int8_t* s) {
    return row_error(p, x, m, n, s);
}
OMNIID_VERSIONS float row_error_of(const Bf16* p, const Bf16* x, const uint8_t* m, int64_t n, int8_t* s) {
    return row_error(p, x, m, n, s);
}

OMNIID_INLINE void store_bits(uint32_t bits, float* out) { std::memcpy(out, &bits, sizeof bits); }
OMNIID_INLINE void store_bits(uint32_t bits, Bf16* out) { out->bits = static_cast<uint16_t>(bits >> 16); }  // exact

template <typename T>
OMNIID_INLINE void widen_signs(const int8_t* __restrict signs, int64_t size, T* __restrict out) {
    for (int64_t start = 0; start < size; start += kLanes) {
        const int64_t stop = start + kLanes < size ? start + kLanes : size;
        uint32_t bits[kLanes];
        for (int64_t i = start; i < stop; ++i) {
            const int32_t sign = signs[i];
            const uint32_t one = 0x3f800000u | (static_cast<uint32_t>(sign) & 0x80000000u);  // 1.0f or -1.0f
            bits[i - start] = sign == 0 ? 0u : one;
        }
        for (int64_t i = start; i < stop; ++i) store_bits(bits[i - start], out + i);
    }
}

OMNIID_VERSIONS void widen_signs_of(const int8_t* signs, int64_t size, float* out) { widen_signs(signs, size, out); }
OMNIID_VERSIONS void widen_signs_of(const int8_t* signs, int64_t size, Bf16* out) { widen_signs(signs, size, out); }

template <typename T, typename X>
static void errors_of(const T* predicted, const X* pixels, const uint8_t* mask, const int64_t* rows, int64_t num_rows,
                      int64_t values, float* errors, int8_t* signs, int64_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(num_threads))
    for (int64_t i = 0; i < num_rows; ++i) {
        const int64_t at = rows[i] * values;
        errors[i] = row_error_of(predicted + i * values, pixels + at, mask + at, values, signs + at);
    }
}

template <typename T>
static void errors_of(const T* predicted, const void* pixels, int64_t pixels_are_bf16, const uint8_t* mask,
                      const int64_t* rows, int64_t num_rows, int64_t values, float* errors, int8_t* signs,
                      int64_t num_threads) {
    if (pixels_are_bf16) {
        errors_of(predicted, static_cast<const Bf16*>(pixels), mask, rows, num_rows, values, errors, signs,
                  num_threads);
    } else {
        errors_of(predicted, static_cast<const float*>(pixels), mask, rows, num_rows, values, errors, signs,
                  num_threads);
    }
}

template <typename T>
static void pick_signs(const int8_t* signs, const int64_t* rows, int64_t num_rows, int64_t values, T* out,
                       int64_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(num_threads))
    for (int64_t i = 0; i < num_rows; ++i) widen_signs_of(signs + rows[i] * values, values, out + i * values);
}

}  // namespace omniid

using namespace omniid;

// mask (num_rows, values), bytes 0 or 1; counts (num_rows) out
extern "C" void omniid_patch_l1_counts(const uint8_t* mask, int64_t num_rows, int64_t values, int64_t* counts,
                                       int64_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(num_threads))
    for (int64_t i = 0; i < num_rows; ++i) counts[i] = count_set(mask + i * values, values);
}

// predicted      (num_rows, values), of the rows named by `rows` (num_rows)
// pixels, mask   (all rows, values)
// errors         (num_rows) out: sum of the masked absolute differences
// signs          (all rows, values) out, in the named rows: sign of predicted - pixels where the mask is set, else 0
extern "C" void omniid_patch_l1_errors_f32(const float* predicted, const void* pixels, int64_t pixels_are_bf16,
                                           const uint8_t* mask, const int64_t* rows, int64_t num_rows, int64_t values,
                                           float* errors, int8_t* signs, int64_t num_threads) {
    errors_of(predicted, pixels, pixels_are_bf16, mask, rows, num_rows, values, errors, signs, num_threads);
}

extern "C" void omniid_patch_l1_errors_bf16(const Bf16* predicted, const void* pixels, int64_t pixels_are_bf16,
                                            const uint8_t* mask, const int64_t* rows, int64_t num_rows,
                                            int64_t values, float* errors, int8_t* signs, int64_t num_threads) {
    errors_of(predicted, pixels, pixels_are_bf16, mask, rows, num_rows, values, errors, signs, num_threads);
}

// The named rows of `signs` (all rows, values) as numbers: out (num_rows, values)
extern "C" void omniid_patch_l1_signs_f32(const int8_t* signs, const int64_t* rows, int64_t num_rows, int64_t values,
                                          float* out, int64_t num_threads) {
    pick_signs(signs, rows, num_rows, values, out, num_threads);
}

extern "C" void omniid_patch_l1_signs_bf16(const int8_t* signs, const int64_t* rows, int64_t num_rows, int64_t values,
                                           Bf16* out, int64_t num_threads) {
    pick_signs(signs, rows, num_rows, values, out, num_threads);
}
