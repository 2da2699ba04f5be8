// Soft shadows from a depth map; the definition is soft_shadow_reference in kernels/soft_shadow.py.
#include <algorithm>
#include <cmath>
#include <cstdint>

// depths   (height, width)
// matrix   (3, 4) takes a point to column and row in texels (centres at whole numbers) and depth
// points   (n, 3)
// normals  (n, 3) of any length
// lift     how far points are moved along their normals first
// lit      (n) out, in [0, 1]
extern "C" __attribute__((target_clones("avx2", "default"))) void omniid_soft_shadow(
    const float* depths, int64_t height, int64_t width, const float* matrix, const float* points, const float* normals,
    float lift, int64_t n, float* lit) {
    const float edge_x = static_cast<float>(width + 2), edge_y = static_cast<float>(height + 2);
    for (int64_t i = 0; i < n; ++i) {
        const float* point = points + 3 * i;
        const float* normal = normals + 3 * i;
        const float length =
            std::sqrt(normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2] + 1e-12f);
        float seen[3];
        const float step = lift / length;
        const float place[3] = {point[0] + normal[0] * step, point[1] + normal[1] * step, point[2] + normal[2] * step};
        for (int k = 0; k < 3; ++k) {
            const float* row = matrix + 4 * k;
            seen[k] = row[0] * place[0] + row[1] * place[1] + row[2] * place[2] + row[3];
        }
        // Beyond the edge all texels are the last one: clamped before the cast, which must not overflow.
        const float x = std::min(std::max(seen[0], -3.0f), edge_x), y = std::min(std::max(seen[1], -3.0f), edge_y);
        const float low_x = std::floor(x), low_y = std::floor(y), fx = x - low_x, fy = y - low_y;
        const float weights_x[4] = {1 - fx, 1, 1, fx}, weights_y[4] = {1 - fy, 1, 1, fy};
        int64_t columns[4];
        for (int k = 0; k < 4; ++k)
            columns[k] = std::min(std::max(static_cast<int64_t>(low_x) + k - 1, int64_t{0}), width - 1);
        float total = 0;
        for (int r = 0; r < 4; ++r) {
            const float* row =
                depths + std::min(std::max(static_cast<int64_t>(low_y) + r - 1, int64_t{0}), height - 1) * width;
            float sum = 0;
            for (int k = 0; k < 4; ++k) sum += row[columns[k]] > seen[2] ? weights_x[k] : 0.0f;
            total += weights_y[r] * sum;
        }
        lit[i] = total * (1.0f / 9);
    }
}
