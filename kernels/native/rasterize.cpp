// Z-buffered triangle rasteriser with perspective-correct interpolation.
// The definition, with the same order of operations, is rasterize_reference in kernels/rasterize.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

struct Coverage {
    double inverse_depth;
    double weight0, weight1;  // perspective-correct weights of the first two corners
    int32_t triangle;
};

}  // namespace

// points      (num_points, 3) x and y in pixels (pixel centres at .5), depth > 0
// triangles   (num_triangles, 3) indices into points, checked by the caller
// attributes  (num_points, channels)
// ids         (height, width) out: nearest triangle, -1 where none
// depths      (height, width) out: depth, +infinity where none
// values      (height, width, channels) out: interpolated attributes, 0 where none
extern "C" void omniid_rasterize(const float* points, const int32_t* triangles, int64_t num_triangles,
                                 const float* attributes, int64_t channels, int64_t height, int64_t width,
                                 int32_t* ids, float* depths, float* values) {
    std::vector<Coverage> buffer(static_cast<size_t>(height * width), Coverage{0.0, 0.0, 0.0, -1});
    for (int64_t t = 0; t < num_triangles; ++t) {
        const float* a = points + 3 * static_cast<int64_t>(triangles[3 * t]);
        const float* b = points + 3 * static_cast<int64_t>(triangles[3 * t + 1]);
        const float* c = points + 3 * static_cast<int64_t>(triangles[3 * t + 2]);
        if (a[2] <= 0 || b[2] <= 0 || c[2] <= 0) continue;
        const double ax = a[0], ay = a[1], bx = b[0], by = b[1], cx = c[0], cy = c[1];
        const double area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax);
        if (std::fabs(area) < 1e-12) continue;
        // Clamped before the cast: a point far outside must not overflow the integer.
        const double low_x = std::max(std::ceil(std::min({ax, bx, cx}) - 0.5), 0.0);
        const double high_x = std::min(std::floor(std::max({ax, bx, cx}) - 0.5), static_cast<double>(width - 1));
        const double low_y = std::max(std::ceil(std::min({ay, by, cy}) - 0.5), 0.0);
        const double high_y = std::min(std::floor(std::max({ay, by, cy}) - 0.5), static_cast<double>(height - 1));
        if (low_x > high_x || low_y > high_y) continue;
        const double ia = 1.0 / a[2], ib = 1.0 / b[2], ic = 1.0 / c[2];
        for (int64_t y = static_cast<int64_t>(low_y); y <= static_cast<int64_t>(high_y); ++y) {
            const double py = y + 0.5;
            Coverage* row = buffer.data() + y * width;
            for (int64_t x = static_cast<int64_t>(low_x); x <= static_cast<int64_t>(high_x); ++x) {
                const double px = x + 0.5;
                const double wa = ((bx - px) * (cy - py) - (by - py) * (cx - px)) / area;
                const double wb = ((cx - px) * (ay - py) - (cy - py) * (ax - px)) / area;
                const double wc = 1.0 - wa - wb;
                if (wa < 0 || wb < 0 || wc < 0) continue;
                const double inverse = wa * ia + wb * ib + wc * ic;
                if (inverse <= row[x].inverse_depth) continue;
                row[x] = Coverage{inverse, wa * ia / inverse, wb * ib / inverse, static_cast<int32_t>(t)};
            }
        }
    }
    for (int64_t pixel = 0; pixel < height * width; ++pixel) {
        const Coverage& hit = buffer[pixel];
        float* value = values + pixel * channels;
        ids[pixel] = hit.triangle;
        if (hit.triangle < 0) {
            depths[pixel] = std::numeric_limits<float>::infinity();
            std::fill(value, value + channels, 0.0f);
            continue;
        }
        depths[pixel] = static_cast<float>(1.0 / hit.inverse_depth);
        const int32_t* corner = triangles + 3 * static_cast<int64_t>(hit.triangle);
        const float* a = attributes + channels * static_cast<int64_t>(corner[0]);
        const float* b = attributes + channels * static_cast<int64_t>(corner[1]);
        const float* c = attributes + channels * static_cast<int64_t>(corner[2]);
        const float wa = static_cast<float>(hit.weight0), wb = static_cast<float>(hit.weight1);
        const float wc = static_cast<float>(1.0 - hit.weight0 - hit.weight1);
        for (int64_t k = 0; k < channels; ++k) value[k] = wa * a[k] + wb * b[k] + wc * c[k];
    }
}
