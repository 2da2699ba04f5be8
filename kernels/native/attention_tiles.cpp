// The loops of attention over one tile in scratch memory; what they compute is said in attention.h.
#include "attention.h"

namespace omniid {

// W values side by side, in one register where the instruction set has it.
template <int W>
struct Vector {
    typedef float type __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
};

// `Rows` rows of a product: each step takes 16 / W vectors of b and one value of a for each row. The sums never leave
// their registers.
template <int W, int Rows>
OMNIID_INLINE void product_of_rows(bool add, int64_t depth, const float* __restrict a, int64_t a_row, int64_t a_step,
                                   const float* __restrict b, int64_t b_row, float* __restrict c, int64_t c_row) {
    using V = typename Vector<W>::type;
    constexpr int kVectors = kLanes / W;
    V sum[Rows][kVectors];
    for (int m = 0; m < Rows; ++m)
        for (int x = 0; x < kVectors; ++x)
            sum[m][x] = add ? *reinterpret_cast<const V*>(c + m * c_row + x * W) : V{};
    for (int64_t k = 0; k < depth; ++k) {
        V right[kVectors];
        for (int x = 0; x < kVectors; ++x) right[x] = *reinterpret_cast<const V*>(b + k * b_row + x * W);
        for (int m = 0; m < Rows; ++m) {
            const float left = a[m * a_row + k * a_step];
            for (int x = 0; x < kVectors; ++x) sum[m][x] += left * right[x];
        }
    }
    for (int m = 0; m < Rows; ++m)
        for (int x = 0; x < kVectors; ++x) *reinterpret_cast<V*>(c + m * c_row + x * W) = sum[m][x];
}

// Most: how many rows fill the registers. Rows are cut into pieces as even as possible: 16 are 6 + 5 + 5.
template <int W, int Most>
OMNIID_INLINE void product_of(bool add, int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_step,
                              const float* b, int64_t b_row, float* c, int64_t c_row) {
    for (int64_t pieces = (rows + Most - 1) / Most; pieces > 0; --pieces) {
        const int64_t now = (rows + pieces - 1) / pieces;
#define OMNIID_ROWS(n)                                                                              \
    case n:                                                                                         \
        if constexpr (n <= Most) product_of_rows<W, n>(add, depth, a, a_row, a_step, b, b_row, c, c_row); \
        break;
        switch (now) {
            OMNIID_ROWS(1)
            OMNIID_ROWS(2)
            OMNIID_ROWS(3)
            OMNIID_ROWS(4)
            OMNIID_ROWS(5)
            OMNIID_ROWS(6)
            OMNIID_ROWS(7)
            OMNIID_ROWS(8)
            OMNIID_ROWS(9)
            OMNIID_ROWS(10)
            OMNIID_ROWS(11)
            OMNIID_ROWS(12)
        }
#undef OMNIID_ROWS
        a += now * a_row;
        c += now * c_row;
        rows -= now;
    }
}

// target_clones would compile one width for all; these differ in width and number of registers: 16 of 8 lanes, 32 of
// 16.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12
__attribute__((target("arch=x86-64-v4"))) void product_version(bool add, int64_t rows, int64_t depth, const float* a,
                                                               int64_t a_row, int64_t a_step, const float* b,
                                                               int64_t b_row, float* c, int64_t c_row) {
    product_of<16, 12>(add, rows, depth, a, a_row, a_step, b, b_row, c, c_row);
}
__attribute__((target("arch=x86-64-v3"))) void product_version(bool add, int64_t rows, int64_t depth, const float* a,
                                                               int64_t a_row, int64_t a_step, const float* b,
                                                               int64_t b_row, float* c, int64_t c_row) {
    product_of<8, 6>(add, rows, depth, a, a_row, a_step, b, b_row, c, c_row);
}
__attribute__((target("default")))
#endif
void product_version(bool add, int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_step,
                     const float* b, int64_t b_row, float* c, int64_t c_row) {
    product_of<4, 2>(add, rows, depth, a, a_row, a_step, b, b_row, c, c_row);
}

void product(bool add, int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b,
             int64_t b_row, float* c, int64_t c_row) {
    product_version(add, rows, depth, a, a_row, a_step, b, b_row, c, c_row);
}

template <typename T>
OMNIID_INLINE void widen_rows_of(const T* __restrict x, int64_t stride, int64_t rows, int64_t size,
                                 float* __restrict out, int64_t width, int64_t out_rows) {
    for (int64_t r = 0; r < rows; ++r, x += stride, out += width) {
        for (int64_t i = 0; i < size; ++i) out[i] = widen(x[i]);
        for (int64_t i = size; i < width; ++i) out[i] = 0;
    }
    std::memset(out, 0, sizeof(float) * static_cast<size_t>((out_rows - rows) * width));
}

OMNIID_VERSIONS void widen_rows(const float* x, int64_t stride, int64_t rows, int64_t size, float* out, int64_t width,
                                int64_t out_rows) {
    widen_rows_of(x, stride, rows, size, out, width, out_rows);
}
OMNIID_VERSIONS void widen_rows(const Bf16* x, int64_t stride, int64_t rows, int64_t size, float* out, int64_t width,
                                int64_t out_rows) {
    widen_rows_of(x, stride, rows, size, out, width, out_rows);
}

// out (8, 8) = factor * x (8, 8) transposed: pairs of rows are woven three times.
OMNIID_INLINE void transpose_8x8(const float* x, int64_t x_row, float factor, float* out, int64_t out_row) {
    using V = Vector<8>::type;
    V r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = *reinterpret_cast<const V*>(x + i * x_row) * factor;
    for (int i = 0; i < 8; i += 2) {
        t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = __builtin_shufflevector(t[i], t[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 1] = __builtin_shufflevector(t[i], t[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        r[i + 2] = __builtin_shufflevector(t[i + 1], t[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 3] = __builtin_shufflevector(t[i + 1], t[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<V*>(out + i * out_row) =
            __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *reinterpret_cast<V*>(out + (i + 4) * out_row) =
            __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

OMNIID_VERSIONS void transpose_rows(const float* x, int64_t width, int64_t columns, float factor, float* out,
                                    int64_t out_row) {
    for (int64_t i = 0; i < columns; i += 8)
        for (int64_t r = 0; r < kLanes; r += 8)
            transpose_8x8(x + r * width + i, width, factor, out + i * out_row + r, out_row);
}

// The loops over scores are written in vectors of 8, since the compiler leaves a comparison of floats scalar.
using Floats = Vector<8>::type;
typedef uint32_t Bits __attribute__((vector_size(32), may_alias));

OMNIID_INLINE Floats* floats(float* x) { return reinterpret_cast<Floats*>(x); }
OMNIID_INLINE const Floats* floats(const float* x) { return reinterpret_cast<const Floats*>(x); }

// x becomes 2^x to 1e-7, for x <= 127; below -125 it is 2^-125, which no sum of probabilities feels. NaN stays NaN.
OMNIID_INLINE void raise_two(Floats& x) {
    x = x < -125.0f ? Floats{} - 125.0f : x;
    const Floats shifted = x + 12582912.0f;  // 1.5 * 2^23: the whole part ends up in the lowest bits
    const Floats f = x - (shifted - 12582912.0f);
    // Powers of ln 2 over factorials, adjusted for the least error on [-0.5, 0.5].
    Floats p = f * 1.5370711e-4f + 1.3399853e-3f;
    p = p * f + 9.6183736e-3f;
    p = p * f + 5.5503290e-2f;
    p = p * f + 2.4022648e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    x = reinterpret_cast<Floats>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23));
}

OMNIID_VERSIONS void softmax_tile(float* scores, int64_t keys, float* most, float* sum, float* shrink) {
    for (int64_t lane = 0; lane < kLanes; lane += 8) {
        const Floats before = *floats(most + lane);
        Floats top = before, total = {};
        for (int64_t j = 0; j < keys; ++j) {
            const Floats score = *floats(scores + j * kLanes + lane);
            top = score > top ? score : top;
        }
        for (int64_t j = 0; j < keys; ++j) {
            Floats p = *floats(scores + j * kLanes + lane) - top;
            raise_two(p);
            *floats(scores + j * kLanes + lane) = p;
            total += p;
        }
        Floats factor = before - top;
        raise_two(factor);
        *floats(shrink + lane) = factor;
        *floats(sum + lane) = *floats(sum + lane) * factor + total;
        *floats(most + lane) = top;
    }
}

OMNIID_VERSIONS void scale_rows(float* __restrict x, int64_t rows, int64_t width, const float* __restrict factors) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; ++i) x[r * width + i] *= factors[r];
}

template <typename T>
OMNIID_INLINE void store_row_of(const float* __restrict x, float factor, const T* base, int64_t size, T* out) {
    // base may be out: each value is read before it is written.
    if (base == nullptr) {
        for (int64_t i = 0; i < size; ++i) narrow(factor * x[i], out + i);
    } else if (base == out) {
        for (int64_t i = 0; i < size; ++i) narrow(widen(out[i]) + factor * x[i], out + i);
    } else {
        for (int64_t i = 0; i < size; ++i) narrow(widen(base[i]) + factor * x[i], out + i);
    }
}

OMNIID_VERSIONS void store_row(const float* x, float factor, const float* base, int64_t size, float* out) {
    store_row_of(x, factor, base, size, out);
}
OMNIID_VERSIONS void store_row(const float* x, float factor, const Bf16* base, int64_t size, Bf16* out) {
    store_row_of(x, factor, base, size, out);
}

OMNIID_VERSIONS void softmax_backward_tile(float* scores, float* slopes, int64_t keys, int64_t row, const float* lse,
                                           const float* delta, float scale) {
    for (int64_t j = 0; j < keys; ++j)
        for (int64_t i = 0; i < row; i += 8) {
            Floats p = *floats(scores + j * row + i) - *floats(lse + i);
            raise_two(p);
            *floats(scores + j * row + i) = p;
            *floats(slopes + j * row + i) = scale * p * (*floats(slopes + j * row + i) - *floats(delta + i));
        }
}

OMNIID_VERSIONS void dot_columns(const float* a, const float* b, int64_t depth, int64_t row, float* out) {
    for (int64_t i = 0; i < row; i += 8) {
        Floats sum = {};
        for (int64_t k = 0; k < depth; ++k) sum += *floats(a + k * row + i) * *floats(b + k * row + i);
        *floats(out + i) = sum;
    }
}

template <typename T>
OMNIID_INLINE void add_rows_of(const float* __restrict x, int64_t count, int64_t stride, int64_t size,
                               T* __restrict out) {
    for (int64_t start = 0; start < size; start += kLanes) {
        const int64_t stop = start + kLanes < size ? start + kLanes : size;
        float sum[kLanes] = {};
        for (int64_t r = 0; r < count; ++r)
            for (int64_t i = start; i < stop; ++i) sum[i - start] += x[r * stride + i];
        for (int64_t i = start; i < stop; ++i) narrow(sum[i - start], out + i);
    }
}

OMNIID_VERSIONS void add_rows(const float* x, int64_t count, int64_t stride, int64_t size, float* out) {
    add_rows_of(x, count, stride, size, out);
}
OMNIID_VERSIONS void add_rows(const float* x, int64_t count, int64_t stride, int64_t size, Bf16* out) {
    add_rows_of(x, count, stride, size, out);
}

}  // namespace omniid
