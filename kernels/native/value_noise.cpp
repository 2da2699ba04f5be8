// Smooth noise from a periodic lattice; the definition is value_noise_reference in kernels/value_noise.py.
#include <cmath>
#include <cstdint>

// lattice  (period, period), period a power of two
// x, y     (n) coordinates, 1 is a cell
// values   (n) out
extern "C" __attribute__((target_clones("avx512f", "avx2", "default"))) void omniid_value_noise(
    const float* lattice, int32_t period, const float* x, const float* y, int64_t n, float* values) {
    const int32_t mask = period - 1;  // the remainder, for negative cells too
    for (int64_t i = 0; i < n; ++i) {
        const float floor_x = std::floor(x[i]), floor_y = std::floor(y[i]);
        float fx = x[i] - floor_x, fy = y[i] - floor_y;
        fx = fx * fx * (3 - 2 * fx);
        fy = fy * fy * (3 - 2 * fy);
        const int32_t column = static_cast<int32_t>(floor_x) & mask, next = (column + 1) & mask;
        const int32_t row = static_cast<int32_t>(floor_y) & mask;
        const int32_t above = row * period, below = ((row + 1) & mask) * period;
        const float top = lattice[above + column] * (1 - fx) + lattice[above + next] * fx;
        const float bottom = lattice[below + column] * (1 - fx) + lattice[below + next] * fx;
        values[i] = top * (1 - fy) + bottom * fy;
    }
}
