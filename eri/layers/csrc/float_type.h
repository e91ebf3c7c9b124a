// What numbers a tensor holds, for kernels and bindings alike: no header of CUDA or PyTorch.
#pragma once

#include <cstdint>

namespace eri {

enum class FloatType : int { kFloat, kHalf, kBFloat16 };

// Numbers in 16 bytes, what a thread reads at once.
constexpr int64_t vector_size(FloatType type) { return type == FloatType::kFloat ? 4 : 8; }

}  // namespace eri
