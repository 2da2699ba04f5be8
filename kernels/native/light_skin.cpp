// Light on skin, one pixel at a time; the definition is light_skin_reference in kernels/light_skin.py.
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

struct Vector {
    float x, y, z;
};

inline float dot(const Vector& a, const Vector& b) { return a.x * b.x + a.y * b.y + a.z * b.z; }

inline Vector unit(const Vector& v) {
    const float scale = 1 / std::sqrt(dot(v, v) + 1e-12f);
    return {v.x * scale, v.y * scale, v.z * scale};
}

}  // namespace

// normals, points, albedo  (n, 3)
// lit, occlusion, gloss, sharpness  (n)
// light, key, ambient, wrap  (3)
// colours  (n, 3) out
extern "C" __attribute__((target_clones("avx2", "default"))) void omniid_light_skin(
    const float* normals, const float* points, const float* albedo, const float* lit, const float* occlusion,
    const float* gloss, const float* sharpness, const float* light, const float* key, const float* ambient,
    const float* wrap, float distance, int64_t n, float* colours) {
    const Vector to_light = {light[0], light[1], light[2]};
    float through[3], widen[3];  // share of the light that shadows let through; 1 / (1 + wrap)
    for (int k = 0; k < 3; ++k) {
        through[k] = 0.12f * wrap[k] / wrap[0];
        widen[k] = 1 / (1 + wrap[k]);
    }
    for (int64_t i = 0; i < n; ++i) {
        const Vector normal = unit({normals[3 * i], normals[3 * i + 1], normals[3 * i + 2]});
        const Vector towards = unit({-points[3 * i], -points[3 * i + 1], distance - points[3 * i + 2]});
        const Vector half = unit({towards.x + to_light.x, towards.y + to_light.y, towards.z + to_light.z});
        const float facing = dot(normal, to_light);
        const float sky = (0.72f + 0.28f * normal.y) * occlusion[i];
        const float mirror = std::max(dot(normal, half), 0.0f), rim = 1 - std::max(dot(normal, towards), 0.0f);
        const float shine = std::pow(mirror, sharpness[i]) * gloss[i] * (occlusion[i] * 0.7f + 0.3f);
        const float grazing = (rim * rim) * (rim * rim) * 0.08f * occlusion[i];
        for (int k = 0; k < 3; ++k) {
            const float diffuse =
                std::max((facing + wrap[k]) * widen[k], 0.0f) * (through[k] + (1 - through[k]) * lit[i]);
            colours[3 * i + k] = albedo[3 * i + k] * (diffuse * key[k] + sky * ambient[k]) + shine * key[k] +
                                 grazing * ambient[k];
        }
    }
}
