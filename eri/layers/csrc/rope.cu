// A thread takes one vector of 16 bytes of a position from each of kRows sequences, which share its
// angles: sines cost more than memory does. All its loads are under way before the first is used.

#include <algorithm>

#include "launch.h"
#include "rope.h"
#include "vectors.h"

namespace eri {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;
constexpr uint32_t kMostBlocks = 65535;  // of a grid's second dimension

// Strides are in vectors.
struct Shape {
  uint32_t sequences;  // outer * inner
  uint32_t inner;
  uint32_t places;     // vectors of a sequence: length * columns
  uint32_t columns;    // vectors of a position
  int64_t outer_stride;
  int64_t inner_stride;
  int64_t length_stride;
};

// The cosines and sines of a vector's pairs, in float32 as PyTorch's own operations compute them.
template <int kPairs>
struct Angles {
  float cosines[kPairs];
  float sines[kPairs];

  __device__ __forceinline__ Angles(uint32_t position, uint32_t column, uint32_t width, float base,
                                    bool inverse) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float exponent = static_cast<float>(2 * (column * kPairs + i)) / width;
      const float angle = static_cast<float>(position) * powf(base, -exponent);
      sincosf(inverse ? -angle : angle, sines + i, cosines + i);
    }
  }
};

template <typename Scalar>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(const uint4* __restrict__ x, uint4* __restrict__ y, Shape shape, float base,
                bool inverse) {
  constexpr int kPairs = Vector<Scalar>::kSize / 2;
  const uint32_t place = blockIdx.x * kThreads + threadIdx.x;
  if (place >= shape.places) return;
  const uint32_t column = place % shape.columns, position = place / shape.columns;
  const uint32_t width = shape.columns * Vector<Scalar>::kSize;
  const Angles<kPairs> angles(position, column, width, base, inverse);
  const uint4* from = x + position * shape.length_stride + column;
  for (uint32_t first = blockIdx.y * kRows; first < shape.sequences; first += gridDim.y * kRows) {
    Vector<Scalar> held[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const uint32_t sequence = first + k;
      if (sequence < shape.sequences) {
        held[k] = load<Scalar>(from + sequence / shape.inner * shape.outer_stride +
                               sequence % shape.inner * shape.inner_stride);
      }
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (first + k >= shape.sequences) return;
#pragma unroll
      for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
        float v[4];
        unpack(held[k], quad, v);
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const float cosine = angles.cosines[2 * quad + i / 2];
          const float sine = angles.sines[2 * quad + i / 2];
          const float one = v[i], other = v[i + 1];
          v[i] = one * cosine - other * sine;
          v[i + 1] = one * sine + other * cosine;
        }
        pack(held[k], quad, v);
      }
      store(y + static_cast<int64_t>(first + k) * shape.places + place, held[k]);
    }
  }
}

template <typename Scalar>
void launch(const RopeArguments& a, cudaStream_t stream) {
  constexpr int64_t kSize = Vector<Scalar>::kSize;
  const uint32_t columns = static_cast<uint32_t>(a.width / kSize);
  const Shape shape = {static_cast<uint32_t>(a.outer * a.inner),
                       static_cast<uint32_t>(a.inner),
                       static_cast<uint32_t>(a.length * columns),
                       columns,
                       a.outer_stride / kSize,
                       a.inner_stride / kSize,
                       a.length_stride / kSize};
  const dim3 blocks((shape.places - 1) / kThreads + 1,
                    std::min(kMostBlocks, (shape.sequences - 1) / kRows + 1));
  rope_kernel<Scalar><<<blocks, kThreads, 0, stream>>>(
      static_cast<const uint4*>(a.x), static_cast<uint4*>(a.result), shape,
      static_cast<float>(a.base), a.inverse);
}

}  // namespace

const char* launch_rope(const RopeArguments& a, void* stream) {
  if (a.outer * a.inner * a.length * a.width == 0) return nullptr;
  return with_type(a.type, [&]<typename Scalar>() {
    launch<Scalar>(a, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace eri
