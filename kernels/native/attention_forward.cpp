// out = base + factor * softmax(scale q k^T) v over sequences of any lengths; the definitions are in
// kernels/varlen_cross_attention.py and kernels/add_identity_attention.py.
//
// A unit of work is some queries of one sequence and head. Keys and values pass by once for all of them, in tiles that
// are widened into scratch memory. A query's result depends on nothing but its own sequence, so neither the number of
// threads nor the size of a unit changes a bit.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace omniid {

constexpr int64_t kMostKeys = 128;     // of a tile: their scores fill a quarter of a first-level cache
constexpr int64_t kMostQueries = 128;  // of a unit: with a tile of keys and values, half of a second-level cache

// What kernels/_native_attention.py fills in; all fields take 8 bytes.
template <typename T>
struct ForwardArguments {
    Sequences<const T> q, k, v, base;  // base.data null: nothing is added; it may be out.data
    Sequences<T> out, attended;        // attended.data null, or: the attention itself, which gradients need
    const float* token_factors;  // (sequences, queries), or null: `factor` for all
    int64_t token_stride;        // between sequences
    float* lse;                  // (heads, all_queries) out, or null: logarithm of each softmax's denominator
    int64_t all_queries, num_sequences, num_heads, size;
    double scale, factor;  // of the scores, of the result
};

struct Unit {
    int64_t sequence, head, first, count;
};

// Fewer queries a unit where several threads would have too few units to share evenly.
template <typename T>
static std::vector<Unit> units_of(const ForwardArguments<T>& a, int64_t num_threads) {
    int64_t blocks = 0;
    for (int64_t b = 0; b < a.num_sequences; ++b) blocks += (a.q.size(b) + kLanes - 1) / kLanes * a.num_heads;
    const int64_t most = kLanes * std::clamp(blocks / (4 * num_threads - 3), int64_t{1}, kMostQueries / kLanes);
    std::vector<Unit> units;
    for (int64_t b = 0; b < a.num_sequences; ++b)
        for (int64_t h = 0; h < a.num_heads; ++h)
            for (int64_t first = 0; first < a.q.size(b); first += most)
                units.push_back({b, h, first, std::min(most, a.q.size(b) - first)});
    return units;
}

template <typename T>
class ForwardWorker {
public:
    ForwardWorker(const ForwardArguments<T>& arguments, int64_t most_queries)
        : a(arguments),
          width(tile_width(a.size)),
          panels((a.size + kLanes - 1) / kLanes),
          most_keys(std::min(kMostKeys, a.k.longest(a.num_sequences))),
          blocks((most_queries + kLanes - 1) / kLanes),
          memory(blocks * kLanes * (2 * width + 2) + 2 * most_keys * width + (most_keys + width + 1) * kLanes, 8),
          rows(memory.take(kLanes * width)),
          queries(memory.take(blocks * width * kLanes)),
          sums(memory.take(blocks * kLanes * width)),
          most(memory.take(blocks * kLanes)),
          total(memory.take(blocks * kLanes)),
          keys(memory.take(most_keys * width)),
          values(memory.take(most_keys * width)),
          scores(memory.take(most_keys * kLanes)),
          shrink(memory.take(kLanes)) {}

    void run(const Unit& unit) {
        for (int64_t first = 0; first < unit.count; first += kLanes) {
            widen_rows(a.q.at(unit.sequence, unit.first + first, unit.head), a.q.row_stride,
                       std::min(kLanes, unit.count - first), a.size, rows, width, kLanes);
            transpose_rows(rows, width, a.size, static_cast<float>(a.scale) * kLog2E, queries + first * width, kLanes);
        }
        std::fill(most, most + unit.count, -std::numeric_limits<float>::infinity());
        std::fill(total, total + unit.count, 0.0f);
        const int64_t num_keys = a.k.size(unit.sequence);
        for (int64_t first = 0; first < num_keys; first += most_keys)
            see(unit, first, std::min(most_keys, num_keys - first));
        for (int64_t i = 0; i < unit.count; ++i) write(unit, i);
    }

private:
    // All queries meet `count` keys.
    void see(const Unit& unit, int64_t first_key, int64_t count) {
        widen_rows(a.k.at(unit.sequence, first_key, unit.head), a.k.row_stride, count, a.size, keys, width, count);
        widen_rows(a.v.at(unit.sequence, first_key, unit.head), a.v.row_stride, count, a.size, values, width, count);
        for (int64_t first = 0; first < unit.count; first += kLanes) {
            const int64_t num_rows = std::min(kLanes, unit.count - first);
            float* sum = sums + first * width;
            product(false, count, a.size, keys, width, 1, queries + first * width, kLanes, scores, kLanes);
            softmax_tile(scores, count, most + first, total + first, shrink);
            if (first_key > 0) scale_rows(sum, num_rows, width, shrink);
            products(first_key > 0, num_rows, count, scores, 1, kLanes, values, width, sum, width, panels);
        }
    }

    void write(const Unit& unit, int64_t i) {
        const int64_t row = unit.first + i;
        const float factor = a.token_factors ? a.token_factors[unit.sequence * a.token_stride + row]
                                             : static_cast<float>(a.factor);
        store_row(sums + i * width, factor / total[i],
                  a.base.data ? a.base.at(unit.sequence, row, unit.head) : nullptr, a.size,
                  a.out.at(unit.sequence, row, unit.head));
        if (a.attended.data)
            store_row(sums + i * width, 1 / total[i], nullptr, a.size, a.attended.at(unit.sequence, row, unit.head));
        if (a.lse) a.lse[unit.head * a.all_queries + a.out.place(unit.sequence, row)] =
            (most[i] + std::log2(total[i])) * kLn2;
    }

    const ForwardArguments<T>& a;
    const int64_t width, panels, most_keys, blocks;
    Scratch memory;
    float* const rows;     // (16, width) of q
    float* const queries;  // (blocks, size, 16) of q, transposed
    float* const sums;     // (queries, width) of values
    float* const most;     // (queries)
    float* const total;    // (queries)
    float* const keys;     // (most_keys, width)
    float* const values;   // (most_keys, width)
    float* const scores;   // (most_keys, 16)
    float* const shrink;   // (16)
};

template <typename T>
static void forward(const ForwardArguments<T>& arguments, int64_t num_threads) {
    const std::vector<Unit> units = units_of(arguments, num_threads);
    const auto num_units = static_cast<int64_t>(units.size());
    int64_t most_queries = 0;
    for (const Unit& unit : units) most_queries = std::max(most_queries, unit.count);
#pragma omp parallel num_threads(static_cast<int>(std::clamp(num_units, int64_t{1}, num_threads)))
    {
        ForwardWorker<T> worker(arguments, most_queries);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < num_units; ++i) worker.run(units[static_cast<size_t>(i)]);
    }
}

}  // namespace omniid

extern "C" void omniid_attention_forward_f32(const omniid::ForwardArguments<float>* arguments, int64_t num_threads) {
    omniid::forward(*arguments, num_threads);
}

extern "C" void omniid_attention_forward_bf16(const omniid::ForwardArguments<omniid::Bf16>* arguments,
                                              int64_t num_threads) {
    omniid::forward(*arguments, num_threads);
}
