// Gradients of factor * softmax(scale q k^T) v over sequences of any lengths; the definitions are in
// kernels/varlen_cross_attention.py and kernels/add_identity_attention.py.
//
// A unit of work is one head of one sequence: no sum is shared between threads, and every sum has a fixed order. With
// p = exp(scale q k^T - lse) and g the incoming gradient times factor: dv = p^T g,
// s = scale p (g v^T - sum(g out)), dq = s k, dk = s^T q. Scores are computed anew, tile by tile.
#include "attention.h"

#include <algorithm>

namespace omniid {

constexpr int64_t kMostKeys = 64;  // of a tile: keys, values and their gradients fill a third of a second-level cache
constexpr int64_t kQueries = 32;   // of a block: the depth of the products that give dk and dv

// What kernels/_native_attention.py fills in; all fields take 8 bytes.
template <typename T>
struct BackwardArguments {
    Sequences<const T> q, k, v, out, grad;
    Sequences<T> dq, dk, dv;
    float* dq_parts;  // (sequences, queries, heads, size), or null: of a q that all sequences share, summed into dq
    const float* lse;            // (heads, all_queries)
    const float* token_factors;  // (sequences, queries) by which attention was multiplied, or null: `factor` for all
    int64_t token_stride;        // between sequences
    float* grad_factors;         // (heads, all_queries) out, or null: each head's share of the factors' gradient
    int64_t all_queries, num_sequences, num_heads, size;
    double scale, factor;
};

template <typename T>
class BackwardWorker {
public:
    explicit BackwardWorker(const BackwardArguments<T>& arguments)
        : a(arguments),
          width(tile_width(a.size)),
          panels((a.size + kLanes - 1) / kLanes),
          most_keys(std::min(kMostKeys, a.k.longest(a.num_sequences))),
          most_queries((a.q.longest(a.num_sequences) + kQueries - 1) / kQueries * kQueries),
          memory(most_queries * (5 * width + 2) + 2 * kQueries * width +
                     most_keys * (4 * width + 2 * kQueries) + kQueries,
                 16),
          q(memory.take(most_queries * width)),
          q_turned(memory.take(most_queries * width)),
          grad(memory.take(most_queries * width)),
          grad_turned(memory.take(most_queries * width)),
          dq(memory.take(most_queries * width)),
          out(memory.take(kQueries * width)),
          out_turned(memory.take(kQueries * width)),
          factors(memory.take(kQueries)),
          lse(memory.take(most_queries)),
          delta(memory.take(most_queries)),
          k(memory.take(most_keys * width)),
          v(memory.take(most_keys * width)),
          dk(memory.take(most_keys * width)),
          dv(memory.take(most_keys * width)),
          scores(memory.take(most_keys * kQueries)),
          slopes(memory.take(most_keys * kQueries)) {}

    void run(int64_t sequence, int64_t head) {
        const int64_t num_queries = a.q.size(sequence), num_keys = a.k.size(sequence);
        for (int64_t first = 0; first < num_queries; first += kQueries)
            prepare(sequence, head, first, std::min(kQueries, num_queries - first));
        for (int64_t first = 0; first < num_keys; first += most_keys)
            see(sequence, head, num_queries, first, std::min(most_keys, num_keys - first));
        for (int64_t i = 0; i < num_queries; ++i) {
            if (a.dq_parts)
                store_row(dq + i * width, 1, nullptr, a.size,
                          a.dq_parts + ((sequence * num_queries + i) * a.num_heads + head) * a.size);
            else
                store_row(dq + i * width, 1, nullptr, a.size, a.dq.at(sequence, i, head));
        }
    }

private:
    // What the products need of `count` queries; the rest of the block becomes zero and adds nothing.
    void prepare(int64_t sequence, int64_t head, int64_t first, int64_t count) {
        widen_rows(a.q.at(sequence, first, head), a.q.row_stride, count, a.size, q + first * width, width, kQueries);
        widen_rows(a.grad.at(sequence, first, head), a.grad.row_stride, count, a.size, grad + first * width, width,
                   kQueries);
        widen_rows(a.out.at(sequence, first, head), a.out.row_stride, count, a.size, out, width, kQueries);
        float* turned = grad_turned + first * width;
        transpose_block(grad + first * width, 1, turned);
        transpose_block(out, 1, out_turned);
        transpose_block(q + first * width, static_cast<float>(a.scale) * kLog2E, q_turned + first * width);
        dot_columns(out_turned, turned, a.size, kQueries, delta + first);
        for (int64_t i = 0; i < kQueries; ++i) {
            const int64_t place = head * a.all_queries + a.out.place(sequence, first + i);
            const float by = a.token_factors && i < count ? a.token_factors[sequence * a.token_stride + first + i]
                                                          : static_cast<float>(a.factor);
            lse[first + i] = i < count ? a.lse[place] * kLog2E : 0.0f;
            if (a.grad_factors && i < count) a.grad_factors[place] = delta[first + i];
            delta[first + i] *= by;
            factors[i] = by;
        }
        if (a.token_factors || a.factor != 1) {
            scale_rows(grad + first * width, kQueries, width, factors);
            transpose_block(grad + first * width, 1, turned);
        }
    }

    // out (size, 32) = factor * x (32, width) transposed
    void transpose_block(const float* x, float factor, float* to) {
        for (int64_t lane = 0; lane < kQueries; lane += kLanes)
            transpose_rows(x + lane * width, width, a.size, factor, to + lane, kQueries);
    }

    // All queries meet `count` keys, whose gradients are complete after that.
    void see(int64_t sequence, int64_t head, int64_t num_queries, int64_t first_key, int64_t count) {
        widen_rows(a.k.at(sequence, first_key, head), a.k.row_stride, count, a.size, k, width, count);
        widen_rows(a.v.at(sequence, first_key, head), a.v.row_stride, count, a.size, v, width, count);
        for (int64_t first = 0; first < num_queries; first += kQueries) {
            const int64_t depth = std::min(kQueries, num_queries - first), at = first * width;
            products(false, count, a.size, k, width, 1, q_turned + at, kQueries, scores, kQueries, kQueries / kLanes);
            products(false, count, a.size, v, width, 1, grad_turned + at, kQueries, slopes, kQueries,
                     kQueries / kLanes);
            softmax_backward_tile(scores, slopes, count, kQueries, lse + first, delta + first,
                                  static_cast<float>(a.scale));
            products(first > 0, count, depth, scores, kQueries, 1, grad + at, width, dv, width, panels);
            products(first > 0, count, depth, slopes, kQueries, 1, q + at, width, dk, width, panels);
            products(first_key > 0, depth, count, slopes, 1, kQueries, k, width, dq + at, width, panels);
        }
        for (int64_t j = 0; j < count; ++j) {
            store_row(dk + j * width, 1, nullptr, a.size, a.dk.at(sequence, first_key + j, head));
            store_row(dv + j * width, 1, nullptr, a.size, a.dv.at(sequence, first_key + j, head));
        }
    }

    const BackwardArguments<T>& a;
    const int64_t width, panels, most_keys, most_queries;
    Scratch memory;
    float* const q;            // (most_queries, width)
    float* const q_turned;     // (blocks, size, 32)
    float* const grad;         // as q
    float* const grad_turned;  // as q_turned
    float* const dq;           // as q
    float* const out;          // (32, width)
    float* const out_turned;   // (size, 32)
    float* const factors;      // (32)
    float* const lse;          // (most_queries), in units of ln 2
    float* const delta;        // (most_queries) sum of grad * out
    float* const k;            // (most_keys, width)
    float* const v;            // as k
    float* const dk;           // as k
    float* const dv;           // as k
    float* const scores;       // (most_keys, 32)
    float* const slopes;       // as scores
};

template <typename T>
static void backward(const BackwardArguments<T>& a, int64_t num_threads) {
    const int64_t num_units = a.num_sequences * a.num_heads;
#pragma omp parallel num_threads(static_cast<int>(num_threads))
    {
        if (num_units > 0) {
            BackwardWorker<T> worker(a);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < num_units; ++i) worker.run(i / a.num_heads, i % a.num_heads);
        }
        if (a.dq_parts) {
            const int64_t row = a.num_heads * a.size;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < a.q.length; ++i)
                add_rows(a.dq_parts + i * row, a.num_sequences, a.q.length * row, row, a.dq.at(0, i, 0));
        }
    }
}

}  // namespace omniid

extern "C" void omniid_attention_backward_f32(const omniid::BackwardArguments<float>* arguments, int64_t num_threads) {
    omniid::backward(*arguments, num_threads);
}

extern "C" void omniid_attention_backward_bf16(const omniid::BackwardArguments<omniid::Bf16>* arguments,
                                               int64_t num_threads) {
    omniid::backward(*arguments, num_threads);
}
