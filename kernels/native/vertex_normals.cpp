// Area-weighted vertex normals; the definition is vertex_normals_reference in kernels/vertex_normals.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// vertices   (num_vertices, 3)
// triangles  (num_triangles, 3) indices into vertices, checked by the caller
// normals    (num_vertices, 3) out: unit length, 0 for a vertex of no triangle
extern "C" void omniid_vertex_normals(const float* vertices, int64_t num_vertices, const int32_t* triangles,
                                      int64_t num_triangles, float* normals) {
    std::vector<double> sums(static_cast<size_t>(3 * num_vertices), 0.0);
    for (int64_t t = 0; t < num_triangles; ++t) {
        const int32_t* index = triangles + 3 * t;
        const float* a = vertices + 3 * static_cast<int64_t>(index[0]);
        const float* b = vertices + 3 * static_cast<int64_t>(index[1]);
        const float* c = vertices + 3 * static_cast<int64_t>(index[2]);
        const float ux = b[0] - a[0], uy = b[1] - a[1], uz = b[2] - a[2];
        const float vx = c[0] - a[0], vy = c[1] - a[1], vz = c[2] - a[2];
        const float face[3] = {uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx};
        for (int corner = 0; corner < 3; ++corner) {
            double* sum = sums.data() + 3 * static_cast<int64_t>(index[corner]);
            for (int axis = 0; axis < 3; ++axis) sum[axis] += face[axis];
        }
    }
    for (int64_t v = 0; v < num_vertices; ++v) {
        const double* sum = sums.data() + 3 * v;
        const double length = std::sqrt(sum[0] * sum[0] + sum[1] * sum[1] + sum[2] * sum[2]);
        const double scale = 1 / std::max(length, 1e-12);
        for (int axis = 0; axis < 3; ++axis) normals[3 * v + axis] = static_cast<float>(sum[axis] * scale);
    }
}
