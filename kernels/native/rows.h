// What the row kernels share: bfloat16 as bits, and functions compiled once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>

// GCC makes one version per name and picks at load time what the processor has; elsewhere the baseline runs.
// Only leaf functions carry it: the bodies of OpenMP regions are split off before the versions are made.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12  // clang says 4; older GCC lacks these names
#define OMNIID_VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define OMNIID_INLINE inline __attribute__((always_inline))
#else
#define OMNIID_VERSIONS
#define OMNIID_INLINE inline
#endif

namespace omniid {

struct Bf16 {
    uint16_t bits;
};

OMNIID_INLINE float widen(float value) { return value; }

OMNIID_INLINE float widen(Bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

OMNIID_INLINE void narrow(float value, float* out) { *out = value; }

// To nearest, ties to even; NaN stays NaN.
OMNIID_INLINE void narrow(float value, Bf16* out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

}  // namespace omniid
