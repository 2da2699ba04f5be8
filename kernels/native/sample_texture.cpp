// Bilinear texture look-up; the definition is sample_texture_reference in kernels/sample_texture.py.
#include <algorithm>
#include <cstdint>

// texture  (height, width, channels), height and width at least 2
// at       (n, 2) column and row, texel centres at .5
// values   (n, channels) out
extern "C" void omniid_sample_texture(const float* texture, int64_t height, int64_t width, int64_t channels,
                                      const float* at, int64_t n, float* values) {
    const float last_x = static_cast<float>(width - 1), last_y = static_cast<float>(height - 1);
    for (int64_t i = 0; i < n; ++i) {
        const float x = std::min(std::max(at[2 * i] - 0.5f, 0.0f), last_x);
        const float y = std::min(std::max(at[2 * i + 1] - 0.5f, 0.0f), last_y);
        const int64_t column = std::min(static_cast<int64_t>(x), width - 2);
        const int64_t row = std::min(static_cast<int64_t>(y), height - 2);
        const float fx = x - static_cast<float>(column), fy = y - static_cast<float>(row);
        const float* top = texture + (row * width + column) * channels;
        const float* bottom = top + width * channels;
        for (int64_t k = 0; k < channels; ++k) {
            const float above = top[k] * (1 - fx) + top[k + channels] * fx;
            const float below = bottom[k] * (1 - fx) + bottom[k + channels] * fx;
            values[i * channels + k] = above * (1 - fy) + below * fy;
        }
    }
}
