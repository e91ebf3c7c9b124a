// One pass over rows of values and gates. A thread takes one vector of 16 bytes of the result from
// each of kRows rows that follow each other; all its loads are under way before the first is used.
// They are ordinary loads: as the first to give up their place in the caches (`load_last`) they take
// 4 % longer on an H200. The arithmetic is hidden there: without it no pass is faster.

#include "geglu.h"
#include "geglu_normal.h"
#include "launch.h"
#include "vectors.h"

namespace eri {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 2;

struct Place {
  uint32_t column;  // of the vector in its row of `columns`
  uint32_t row;     // the first of kRows
};

__device__ __forceinline__ Place place(uint32_t columns) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  return {thread % columns, thread / columns * kRows};
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 4)
    forward_kernel(Rows<const uint4> u, Rows<uint4> a, uint32_t rows, uint32_t columns) {
  const auto [column, first] = place(columns);
  Vector<Scalar> values[kRows], gates[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    if (first + k < rows) {
      const uint4* from = u[first] + k * u.stride + column;
      values[k] = load<Scalar>(from);
      gates[k] = load<Scalar>(from + columns);
    }
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    if (first + k >= rows) return;
    Vector<Scalar> result;
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float v[4], g[4];
      unpack(values[k], quad, v);
      unpack(gates[k], quad, g);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] *= g[i] * normal<Scalar>(g[i]).cdf;
      pack(result, quad, v);
    }
    store(a[first] + k * a.stride + column, result);
  }
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 4)
    backward_kernel(Rows<const uint4> da, Rows<const uint4> u, Rows<uint4> du, Rows<uint4> a,
                    uint32_t rows, uint32_t columns) {
  const auto [column, first] = place(columns);
  Vector<Scalar> gradients[kRows], values[kRows], gates[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    if (first + k < rows) {
      const uint4* from = u[first] + k * u.stride + column;
      gradients[k] = load<Scalar>(da[first] + k * da.stride + column);
      values[k] = load<Scalar>(from);
      gates[k] = load<Scalar>(from + columns);
    }
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    if (first + k >= rows) return;
    Vector<Scalar> to_value, to_gate, again;
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float d[4], v[4], g[4], r[4];
      unpack(gradients[k], quad, d);
      unpack(values[k], quad, v);
      unpack(gates[k], quad, g);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Normal at = normal<Scalar>(g[i]);
        r[i] = v[i] * (g[i] * at.cdf);
        v[i] *= d[i] * fmaf(g[i], at.density, at.cdf);
        d[i] *= g[i] * at.cdf;
      }
      pack(again, quad, r);
      pack(to_value, quad, d);
      pack(to_gate, quad, v);
    }
    uint4* to = du[first] + k * du.stride + column;
    store(to, to_value);
    store(to + columns, to_gate);
    store(a[first] + k * a.stride + column, again);
  }
}

template <typename Scalar>
void launch(const GegluArguments& a, cudaStream_t stream) {
  const uint32_t columns = static_cast<uint32_t>(a.width / Vector<Scalar>::kSize);
  const uint32_t rows = static_cast<uint32_t>(a.rows);
  const int64_t threads = (a.rows + kRows - 1) / kRows * columns;
  const uint32_t blocks = static_cast<uint32_t>((threads + kThreads - 1) / kThreads);
  const auto u = rows_of<Scalar>(a.u, a.u_stride);
  const auto da = rows_of<Scalar>(a.da, a.da_stride);
  const auto result = rows_of<Scalar>(a.result, a.result_stride);
  if (a.da == nullptr) {
    forward_kernel<Scalar><<<blocks, kThreads, 0, stream>>>(u, result, rows, columns);
  } else {
    const auto again = rows_of<Scalar>(a.again, a.width);
    backward_kernel<Scalar><<<blocks, kThreads, 0, stream>>>(da, u, result, again, rows, columns);
  }
}

const char* launch_either(const GegluArguments& a, void* stream) {
  if (a.rows == 0 || a.width == 0) return nullptr;
  return with_type(a.type, [&]<typename Scalar>() {
    launch<Scalar>(a, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace

const char* launch_geglu(const GegluArguments& arguments, void* stream) {
  return launch_either(arguments, stream);
}

const char* launch_geglu_backward(const GegluArguments& arguments, void* stream) {
  return launch_either(arguments, stream);
}

}  // namespace eri
