// A warp takes a row and keeps it in registers, so that it is read once: the mean, then the mean
// square around it, then the result.

#include "layer_norm.h"
#include "launch.h"
#include "layer_norm_rows.h"

namespace eri {
namespace {

constexpr int kWarps = 4;  // of a block; a row each

__device__ __forceinline__ uint32_t row_of_warp() {
  return blockIdx.x * kWarps + threadIdx.x / 32;
}

template <typename Scalar, int kHeld, bool kAdd>
__global__ void __launch_bounds__(32 * kWarps)
    forward_kernel(Rows<const uint4> x, Rows<const uint4> added, const uint4* __restrict__ weight,
                   const uint4* __restrict__ bias, Rows<uint4> total, Rows<uint4> n,
                   float2* __restrict__ mean_rstd, Shape shape, float eps) {
  const uint32_t row = row_of_warp();
  if (row >= shape.rows) return;
  Vector<Scalar> held[kHeld];
  const float2 moments = normalise_row<Scalar, kHeld, kAdd>(x[row], added[row], total[row], weight,
                                                            bias, n[row], shape, eps, held);
  if (threadIdx.x % 32 == 0) mean_rstd[row] = moments;
}

template <typename Scalar, int kHeld, bool kResidual>
__global__ void __launch_bounds__(32 * kWarps)
    backward_kernel(Rows<const uint4> dn, Rows<const uint4> x, Rows<const uint4> residual,
                    const uint4* __restrict__ weight, const uint4* __restrict__ bias,
                    const float2* __restrict__ mean_rstd, Rows<uint4> dx, Rows<uint4> n,
                    Shape shape) {
  const uint32_t row = row_of_warp();
  if (row >= shape.rows) return;
  Vector<Scalar> held[kHeld];
  differentiate_row<Scalar, kHeld, kResidual>(dn[row], x[row], residual[row], weight, bias,
                                              mean_rstd[row], dx[row], n[row], shape, held);
}

template <typename Scalar, int kHeld>
void launch_held(const LayerNormArguments& a, const Shape& shape, cudaStream_t stream) {
  const uint32_t blocks = (shape.rows + kWarps - 1) / kWarps;
  const auto x = rows_of<Scalar>(a.x, a.x_stride);
  const auto added = rows_of<Scalar>(a.added, a.added_stride);
  const auto dn = rows_of<Scalar>(a.dn, a.dn_stride);
  const auto residual = rows_of<Scalar>(a.residual, a.residual_stride);
  const auto sum = rows_of<Scalar>(a.sum, a.width);
  const auto again = rows_of<Scalar>(a.again, a.width);
  const auto result = rows_of<Scalar>(a.result, a.result_stride);
  const uint4* weight = static_cast<const uint4*>(a.weight);
  const uint4* bias = static_cast<const uint4*>(a.bias);
  float2* moments = reinterpret_cast<float2*>(a.mean_rstd);
  const auto forward = [&](auto kernel) {
    kernel<<<blocks, 32 * kWarps, 0, stream>>>(x, added, weight, bias, sum, result, moments, shape,
                                               static_cast<float>(a.eps));
  };
  const auto backward = [&](auto kernel) {
    kernel<<<blocks, 32 * kWarps, 0, stream>>>(dn, x, residual, weight, bias, moments, result, again,
                                               shape);
  };
  if (a.dn == nullptr) {
    a.added == nullptr ? forward(forward_kernel<Scalar, kHeld, false>)
                       : forward(forward_kernel<Scalar, kHeld, true>);
  } else {
    a.residual == nullptr ? backward(backward_kernel<Scalar, kHeld, false>)
                          : backward(backward_kernel<Scalar, kHeld, true>);
  }
}

template <typename Scalar>
void launch(const LayerNormArguments& a, cudaStream_t stream) {
  const int columns = static_cast<int>(a.width / Vector<Scalar>::kSize);
  const Shape shape = {static_cast<uint32_t>(a.rows), columns, 1.0f / static_cast<float>(a.width)};
  if (columns <= 32) {
    launch_held<Scalar, 1>(a, shape, stream);
  } else if (columns <= 64) {
    launch_held<Scalar, 2>(a, shape, stream);
  } else if (columns <= 96) {
    launch_held<Scalar, 3>(a, shape, stream);
  } else if (columns <= 160) {
    launch_held<Scalar, 5>(a, shape, stream);
  } else {
    launch_held<Scalar, kLayerNormVectors / 32>(a, shape, stream);
  }
}

const char* launch_either(const LayerNormArguments& a, void* stream) {
  if (a.rows == 0) return nullptr;
  if (a.narrow.down != nullptr) return launch_layer_norm_narrow(a, stream);
  return with_type(a.type, [&]<typename Scalar>() {
    launch<Scalar>(a, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace

const char* launch_layer_norm(const LayerNormArguments& arguments, void* stream) {
  return launch_either(arguments, stream);
}

const char* launch_layer_norm_backward(const LayerNormArguments& arguments, void* stream) {
  return launch_either(arguments, stream);
}

}  // namespace eri
