// A thread adds a vector of 16 bytes in kPixels pixels that follow each other.

#include "add_maps.h"
#include "launch.h"
#include "vectors.h"

namespace eri {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 4;

template <typename Scalar, bool kBoth>
__global__ void __launch_bounds__(kThreads)
    add_kernel(uint4* y, const uint4* __restrict__ x, const uint4* __restrict__ bias,
               int64_t pixels, uint32_t width) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t column = thread % width;
  const int64_t first = static_cast<int64_t>(thread / width) * kPixels;
  const int64_t at = first * width + column;
  Vector<Scalar> sums[kPixels], others[kPixels];
#pragma unroll
  for (int k = 0; k < kPixels; ++k) {
    if (first + k < pixels) {
      sums[k] = from_words<Scalar>(y[at + k * static_cast<int64_t>(width)]);
      if (kBoth) others[k] = load_last<Scalar>(x + at + k * static_cast<int64_t>(width));
    }
  }
  const Vector<Scalar> constants = load<Scalar>(bias + column);
#pragma unroll
  for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
    float b[4];
    unpack(constants, quad, b);
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      float sum[4], other[4] = {};
      unpack(sums[k], quad, sum);
      if (kBoth) unpack(others[k], quad, other);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = (sum[i] + b[i]) + other[i];
      pack(sums[k], quad, sum);
    }
  }
#pragma unroll
  for (int k = 0; k < kPixels; ++k) {
    if (first + k < pixels) store(y + at + k * static_cast<int64_t>(width), sums[k]);
  }
}

}  // namespace

const char* launch_add_maps(const AddMapsArguments& a, void* stream) {
  const int64_t threads = (a.pixels + kPixels - 1) / kPixels * a.width;
  const uint32_t blocks = static_cast<uint32_t>((threads + kThreads - 1) / kThreads);
  if (blocks == 0) return nullptr;
  return with_type(a.type, [&]<typename Scalar>() {
    const auto kernel = a.x == nullptr ? add_kernel<Scalar, false> : add_kernel<Scalar, true>;
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<uint4*>(a.y), static_cast<const uint4*>(a.x),
        static_cast<const uint4*>(a.bias), a.pixels, static_cast<uint32_t>(a.width));
  });
}

}  // namespace eri
