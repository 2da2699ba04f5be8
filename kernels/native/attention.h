// What the attention kernels share: where the tensors lie, tiles in scratch memory, and the loops over a tile.
//
// Scores are kept transposed, a row of 16 queries for each key. So the softmax runs down columns, never across a vector,
// and every product of forward and backward takes its left side value by value and its right side in rows of 16: keys
// and values are used as they lie, and only queries (and their gradients) are ever transposed, once.
#pragma once
#include "rows.h"

#include <memory>
#include <vector>

namespace omniid {

constexpr int64_t kLanes = 16;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Rows of a tile in memory: whole panels of 16 values, in an odd number, so that rows do not share cache sets.
inline int64_t tile_width(int64_t size) {
    const int64_t panels = (size + kLanes - 1) / kLanes;
    return (panels % 2 ? panels : panels + 1) * kLanes;
}

// (sequences, rows of each, heads, values side by side). Bounds (sequences + 1) tell rows of uneven sequences apart;
// without them every sequence has `length` rows. Strides in elements.
template <typename T>
struct Sequences {
    T* data;
    int64_t batch_stride, row_stride, head_stride;
    const int64_t* bounds;
    int64_t length;

    // Of a row among those of all sequences.
    int64_t place(int64_t sequence, int64_t row) const {
        return (bounds ? bounds[sequence] : sequence * length) + row;
    }
    T* at(int64_t sequence, int64_t row, int64_t head) const {
        const int64_t first = bounds ? bounds[sequence] : 0;
        return data + sequence * batch_stride + (first + row) * row_stride + head * head_stride;
    }
    int64_t size(int64_t sequence) const { return bounds ? bounds[sequence + 1] - bounds[sequence] : length; }
    int64_t longest(int64_t num_sequences) const {
        int64_t most = 0;
        for (int64_t b = 0; b < num_sequences; ++b) most = size(b) > most ? size(b) : most;
        return most;
    }
};

// Memory of one thread, cut into pieces that start at a cache line.
class Scratch {
public:
    Scratch(int64_t floats, int64_t most_pieces)
        : memory_(new float[static_cast<size_t>(floats + 16 * (most_pieces + 1))]) {
        const auto address = reinterpret_cast<uintptr_t>(memory_.get());
        next_ = memory_.get() + (64 - address % 64) % 64 / sizeof(float);
    }
    float* take(int64_t floats) {
        float* piece = next_;
        next_ += (floats + 15) / 16 * 16;
        return piece;
    }

private:
    std::unique_ptr<float[]> memory_;
    float* next_;
};

// c[m][n] = sum_k a[m * a_row + k * a_step] * b[k * b_row + n], or c += that, for n < 16.
void product(bool add, int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b,
             int64_t b_row, float* c, int64_t c_row);

// The same for the `panels` of 16 columns.
inline void products(bool add, int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_step,
                     const float* b, int64_t b_row, float* c, int64_t c_row, int64_t panels) {
    for (int64_t p = 0; p < panels; ++p)
        product(add, rows, depth, a, a_row, a_step, b + p * kLanes, b_row, c + p * kLanes, c_row);
}

// out (out_rows, width) fp32 = x (rows, size), zero elsewhere.
void widen_rows(const float* x, int64_t stride, int64_t rows, int64_t size, float* out, int64_t width,
                int64_t out_rows);
void widen_rows(const Bf16* x, int64_t stride, int64_t rows, int64_t size, float* out, int64_t width,
                int64_t out_rows);

// out (columns, 16) = factor * x (16, columns) transposed, with columns rounded up to a multiple of 8.
void transpose_rows(const float* x, int64_t width, int64_t columns, float factor, float* out, int64_t out_row);

// One step of a softmax that sees the scores (keys, 16), in units of ln 2, a tile at a time: most (16) is the largest
// so far and sum (16) the denominator relative to it. scores become probabilities relative to `most`; shrink (16) says
// what earlier results are to be multiplied with.
void softmax_tile(float* scores, int64_t keys, float* most, float* sum, float* shrink);

// x (rows, width) *= factors (rows)
void scale_rows(float* x, int64_t rows, int64_t width, const float* factors);

// out (size) = base + factor * x; without base, factor * x
void store_row(const float* x, float factor, const float* base, int64_t size, float* out);
void store_row(const float* x, float factor, const Bf16* base, int64_t size, Bf16* out);

// scores (keys, row) become probabilities p = 2 ^ (scores - lse), slopes (keys, row) become
// scale * p * (slopes - delta); lse and delta (row), a multiple of 8.
void softmax_backward_tile(float* scores, float* slopes, int64_t keys, int64_t row, const float* lse,
                           const float* delta, float scale);

// out (row) = sum over k < depth of a[k] * b[k], rows of a multiple of 8; in the order in which `product` sums, so that
// equal terms give equal sums.
void dot_columns(const float* a, const float* b, int64_t depth, int64_t row, float* out);

// out (size) = x[0] + x[stride] + ..., `count` rows, in that order
void add_rows(const float* x, int64_t count, int64_t stride, int64_t size, float* out);
void add_rows(const float* x, int64_t count, int64_t stride, int64_t size, Bf16* out);

}  // namespace omniid
