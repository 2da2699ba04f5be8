// Z-buffered triangle rasteriser with perspective-correct interpolation.
// The definition, with the same order of operations, is rasterize_reference in kernels/rasterize.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

struct Corner {
    double x, y, inverse_depth;
};

Corner corner(const float* point) { return {point[0], point[1], 1.0 / point[2]}; }

// Twice the signed area of (p, q, pixel).
inline double edge(const Corner& p, const Corner& q, double x, double y) {
    return (p.x - x) * (q.y - y) - (p.y - y) * (q.x - x);
}

// Perspective-correct weights of a triangle's corners at a pixel centre, given the depth there.
struct Weights {
    float a, b, c;
};

inline Weights weights_at(const Corner& a, const Corner& b, const Corner& c, double x, double y, double depth) {
    const double area = (b.x - a.x) * (c.y - a.y) - (b.y - a.y) * (c.x - a.x);
    const double wa = edge(b, c, x, y) * (1.0 / area) * a.inverse_depth * depth;
    const double wb = edge(c, a, x, y) * (1.0 / area) * b.inverse_depth * depth;
    return {static_cast<float>(wa), static_cast<float>(wb), static_cast<float>(1.0 - wa - wb)};
}

}  // namespace

// points      (num_points, 3) x and y in pixels (pixel centres at .5), depth > 0
// triangles   (num_triangles, 3) indices into points, checked by the caller
// ids         (height, width) out: nearest triangle, -1 where none
// depths      (height, width) out: depth, +infinity where none
// AVX2 for its rounding instructions and for rows of wide triangles. No wider: AVX-512 brings fused multiply-add, whose
// rounding gives pixels on an edge to another triangle than the definition does.
extern "C" __attribute__((target_clones("avx2", "default"))) void omniid_rasterize(
    const float* points, const int32_t* triangles, int64_t num_triangles, int64_t height, int64_t width,
    int32_t* __restrict__ ids, float* __restrict__ depths) {
    std::vector<double> nearest(static_cast<size_t>(height * width), 0.0);
    std::fill(ids, ids + height * width, -1);
    for (int64_t t = 0; t < num_triangles; ++t) {
        const float* pa = points + 3 * static_cast<int64_t>(triangles[3 * t]);
        const float* pb = points + 3 * static_cast<int64_t>(triangles[3 * t + 1]);
        const float* pc = points + 3 * static_cast<int64_t>(triangles[3 * t + 2]);
        if (pa[2] <= 0 || pb[2] <= 0 || pc[2] <= 0) continue;
        // Clamped before the cast: a point far outside must not overflow the integer.
        const double min_x = std::min({pa[0], pb[0], pc[0]}), max_x = std::max({pa[0], pb[0], pc[0]});
        const double min_y = std::min({pa[1], pb[1], pc[1]}), max_y = std::max({pa[1], pb[1], pc[1]});
        const double low_x = std::max(std::ceil(min_x - 0.5), 0.0);
        const double high_x = std::min(std::floor(max_x - 0.5), static_cast<double>(width - 1));
        const double low_y = std::max(std::ceil(min_y - 0.5), 0.0);
        const double high_y = std::min(std::floor(max_y - 0.5), static_cast<double>(height - 1));
        if (low_x > high_x || low_y > high_y) continue;
        const Corner a = corner(pa), b = corner(pb), c = corner(pc);
        const double area = (b.x - a.x) * (c.y - a.y) - (b.y - a.y) * (c.x - a.x);
        if (std::fabs(area) < 1e-12) continue;
        const double scale = 1.0 / area;
        const int32_t first_x = static_cast<int32_t>(low_x), count = static_cast<int32_t>(high_x) - first_x + 1;
        const int32_t id = static_cast<int32_t>(t);
        for (int64_t y = static_cast<int64_t>(low_y); y <= static_cast<int64_t>(high_y); ++y) {
            double* __restrict__ row = nearest.data() + y * width + first_x;
            int32_t* __restrict__ id_row = ids + y * width + first_x;
            const double py = y + 0.5;
            // Without a branch, so that the compiler takes several pixels at a time.
            for (int32_t x = 0; x < count; ++x) {
                const double px = (first_x + x) + 0.5;
                const double wa = edge(b, c, px, py) * scale;
                const double wb = edge(c, a, px, py) * scale;
                const double wc = 1.0 - wa - wb;
                const double inverse = wa * a.inverse_depth + wb * b.inverse_depth + wc * c.inverse_depth;
                const bool visible = (wa >= 0) & (wb >= 0) & (wc >= 0) & (inverse > row[x]);
                row[x] = visible ? inverse : row[x];
                id_row[x] = visible ? id : id_row[x];
            }
        }
    }
    for (int64_t pixel = 0; pixel < height * width; ++pixel)
        depths[pixel] = ids[pixel] < 0 ? std::numeric_limits<float>::infinity() : static_cast<float>(1.0 / nearest[pixel]);
}

// pixels      (num_pixels) indices into the raster, row * width + column, all of them covered
// ids, depths (height, width) as omniid_rasterize wrote them
// attributes  (num_points, channels)
// values      (num_pixels, channels) out: interpolated attributes
extern "C" __attribute__((target_clones("avx2", "default"))) void omniid_interpolate(
    const float* points, const int32_t* triangles, const float* attributes, int64_t channels, const int32_t* ids,
    const float* depths, int64_t width, const int64_t* pixels, int64_t num_pixels, float* values) {
    for (int64_t n = 0; n < num_pixels; ++n) {
        const int64_t pixel = pixels[n];
        const int32_t* index = triangles + 3 * static_cast<int64_t>(ids[pixel]);
        const Corner a = corner(points + 3 * static_cast<int64_t>(index[0]));
        const Corner b = corner(points + 3 * static_cast<int64_t>(index[1]));
        const Corner c = corner(points + 3 * static_cast<int64_t>(index[2]));
        const Weights w = weights_at(a, b, c, pixel % width + 0.5, pixel / width + 0.5, depths[pixel]);
        const float* va = attributes + channels * static_cast<int64_t>(index[0]);
        const float* vb = attributes + channels * static_cast<int64_t>(index[1]);
        const float* vc = attributes + channels * static_cast<int64_t>(index[2]);
        float* value = values + n * channels;
        for (int64_t k = 0; k < channels; ++k) value[k] = w.a * va[k] + w.b * vb[k] + w.c * vc[k];
    }
}
