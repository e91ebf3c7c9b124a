// Backward: sums of each tile, then the gradient of the map.

#include "group_norm_tiles.h"

namespace eri {
namespace {

// What reaches y from its gradient through SiLU.
template <typename Scalar, bool kSilu>
__device__ __forceinline__ float through_silu(float gradient, float y) {
  if (!kSilu) return gradient;
  const float sigmoid = reciprocal<Scalar>(1.0f + exponential<Scalar>(-y));
  return gradient * sigmoid * fmaf(y, 1.0f - sigmoid, 1.0f);
}

// Leaves the sums of gamma g and of gamma g x' of each group of the tile, where g is the gradient
// before SiLU and x' the normalised input: gamma x' is y - beta.
template <typename Scalar, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2)
    sums_kernel(const uint4* __restrict__ dy, const uint4* __restrict__ x, Rows<const uint4> added,
                const float2* __restrict__ mean_rstd, const Scalar* __restrict__ weight,
                const Scalar* __restrict__ bias, float2* __restrict__ partials, Tiling t) {
  constexpr int kSize = Vector<Scalar>::kSize, kUnroll = 2;
  constexpr int kNumbers = 2 * kSize * kStride;
  static_assert(kTableSize<Scalar, 2> <= kNumbers, "the table shares its place with the sums");
  __shared__ alignas(16) float numbers[kNumbers];
  const Table<Scalar> table = {numbers, t.vectors};
  const Place p = place<Scalar>(t);
  const int first_channel = blockIdx.y * t.vectors * kSize;
  const int first_group = blockIdx.z * t.groups + blockIdx.y * t.slab_groups;

#pragma unroll 1
  for (int channel = threadIdx.x; channel < t.vectors * kSize; channel += blockDim.x) {
    const float2 moments = mean_rstd[first_group + channel / t.width];
    set_affine(table, channel, added_to<Scalar>(added, first_channel + channel) - moments.x,
               moments.y, static_cast<float>(weight[first_channel + channel]),
               static_cast<float>(bias[first_channel + channel]));
  }
  __syncthreads();

  float sum[kSize] = {}, product[kSize] = {};  // of g, and of g y
#pragma unroll 1
  for (int at = p.row; at < p.end; at += kUnroll * p.step) {
    Vector<Scalar> gradients[kUnroll], inputs[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int on = at + k * p.step;
      gradients[k] = on < p.end ? load<Scalar>(dy + p.first + on) : zeros<Scalar>();
      inputs[k] = on < p.end ? load<Scalar>(x + p.first + on) : zeros<Scalar>();
    }
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float slope[4], offset[4];
      table.get(0, quad, p.column, slope);
      table.get(1, quad, p.column, offset);
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        float g[4], y[4];
        unpack(gradients[k], quad, g);
        unpack(inputs[k], quad, y);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          y[i] = fmaf(slope[i], y[i], offset[i]);
          g[i] = through_silu<Scalar, kSilu>(g[i], y[i]);
          sum[4 * quad + i] += g[i];
          product[4 * quad + i] = fmaf(g[i], y[i], product[4 * quad + i]);
        }
      }
    }
  }
  __syncthreads();  // all have read the table
  float* sums = numbers;
  float* products = numbers + kSize * kStride;
  if (p.row < p.end) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sums[i * kStride + threadIdx.x] = sum[i];
      products[i * kStride + threadIdx.x] = product[i];
    }
  }
  __syncthreads();

  const int rows = min(t.rows, tile_length(t, blockIdx.x));
  for (int group = threadIdx.x / 32; group < t.slab_groups; group += blockDim.x / 32) {
    float first = 0.0f, second = 0.0f;
    visit_group<Scalar>(t, group, rows, [&](int entry, int, int channel) {
      const float gamma = static_cast<float>(weight[first_channel + channel]);
      const float beta = static_cast<float>(bias[first_channel + channel]);
      first = fmaf(gamma, sums[entry], first);
      second += fmaf(-beta, sums[entry], products[entry]);
    });
    first = warp_sum(first);
    second = warp_sum(second);
    if (threadIdx.x % 32 == 0) {
      partials[partial_of(t, group, blockIdx.x)] = make_float2(first, second);
    }
  }
}

// dx = slope g + line (x + added - mean) + constant: `line` and `constant` of each group from the
// sums of its tiles.
__device__ __forceinline__ void finish_sums(const float2* partials, const float2* mean_rstd,
                                            const Tiling& t, float2* lines) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int first_group = blockIdx.z * t.groups + blockIdx.y * t.slab_groups;
  Parts parts;
  for (int from = threadIdx.x / 32; from < t.slab_groups; from += kWarpGroups * warps) {
    parts.fetch(partials, t, from);
#pragma unroll
    for (int k = 0; k < kWarpGroups; ++k) {
      float first = 0.0f, second = 0.0f;
#pragma unroll
      for (int i = 0; i < kLaneTiles; ++i) {
        first += parts.of[k][i].x;
        second += parts.of[k][i].y;
      }
      first = warp_sum(first);
      second = warp_sum(second);
      const int group = from + k * warps;
      if (lane == 0 && group < t.slab_groups) {
        const float2 moments = mean_rstd[first_group + group];
        const float share = moments.y / (static_cast<float>(t.pixels) * t.width);
        lines[group] = make_float2(-share * moments.y * second, -share * first);
      }
    }
  }
}

template <typename Scalar, bool kSilu, bool kPlus>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_kernel(const uint4* __restrict__ dy, const uint4* __restrict__ x,
                    Rows<const uint4> added, const uint4* __restrict__ plus,
                    const float2* __restrict__ mean_rstd, const Scalar* __restrict__ weight,
                    const Scalar* __restrict__ bias, const float2* __restrict__ partials,
                    uint4* __restrict__ dx, Tiling t) {
  constexpr int kSize = Vector<Scalar>::kSize, kUnroll = kPlus ? 1 : 2;  // as registers allow
  __shared__ alignas(16) float numbers[kTableSize<Scalar, 4>];
  __shared__ float2 lines[kGroups];
  const Table<Scalar> table = {numbers, t.vectors};
  const Place p = place<Scalar>(t);

  Vector<Scalar> gradients[kUnroll], inputs[kUnroll], others[kUnroll];
  const auto fetch = [&](int at) {
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int back = at + k * p.step;
      if (back < p.end) {
        gradients[k] = load_last<Scalar>(dy + p.last - back);
        inputs[k] = load_last<Scalar>(x + p.last - back);
        if (kPlus) others[k] = load_last<Scalar>(plus + p.last - back);
      }
    }
  };
  fetch(p.row);

  finish_sums(partials, mean_rstd, t, lines);
  __syncthreads();
  const int first_channel = blockIdx.y * t.vectors * kSize;
  const int first_group = blockIdx.z * t.groups + blockIdx.y * t.slab_groups;
#pragma unroll 1
  for (int channel = threadIdx.x; channel < t.vectors * kSize; channel += blockDim.x) {
    const int group = channel / t.width;
    const float2 moments = mean_rstd[first_group + group];
    const float nearer = added_to<Scalar>(added, first_channel + channel) - moments.x;
    set_affine(table, channel, nearer, moments.y,
               static_cast<float>(weight[first_channel + channel]),
               static_cast<float>(bias[first_channel + channel]));
    table.set(2, channel, lines[group].x);
    table.set(3, channel, fmaf(lines[group].x, nearer, lines[group].y));
  }
  __syncthreads();

#pragma unroll 1
  for (int at = p.row; at < p.end; at += kUnroll * p.step) {
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float slope[4], offset[4], line[4], constant[4];
      table.get(0, quad, p.column, slope);
      table.get(1, quad, p.column, offset);
      table.get(2, quad, p.column, line);
      table.get(3, quad, p.column, constant);
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        float g[4], out[4], more[4];
        unpack(gradients[k], quad, g);
        unpack(inputs[k], quad, out);
        if (kPlus) unpack(others[k], quad, more);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          g[i] = through_silu<Scalar, kSilu>(g[i], fmaf(slope[i], out[i], offset[i]));
          out[i] = fmaf(slope[i], g[i], fmaf(line[i], out[i], constant[i]));
          if (kPlus) out[i] += more[i];
        }
        pack(inputs[k], quad, out);
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int back = at + k * p.step;
      if (back < p.end) store(dx + p.last - back, inputs[k]);
    }
    fetch(at + kUnroll * p.step);
  }
}

}  // namespace

const char* launch_group_norm_backward(const GroupNormArguments& a, void* stream_handle) {
  const Tiling t = tiling(a, multiprocessors());
  const dim3 grid(t.tiles, t.slabs, static_cast<unsigned int>(a.samples));
  const int threads = block_threads(t);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const uint4* x = static_cast<const uint4*>(a.x);
  const uint4* dy = static_cast<const uint4*>(a.dy);
  const uint4* plus = static_cast<const uint4*>(a.plus);
  const float2* mean_rstd = reinterpret_cast<const float2*>(a.mean_rstd);
  float2* partials = reinterpret_cast<float2*>(a.workspace);
  return with_types(a, [&]<typename Scalar, bool kSilu>() {
    const Scalar* weight = static_cast<const Scalar*>(a.weight);
    const Scalar* bias = static_cast<const Scalar*>(a.bias);
    const Rows<const uint4> added = rows_of<Scalar>(a.added, a.added_stride);
    sums_kernel<Scalar, kSilu>
        <<<grid, threads, 0, stream>>>(dy, x, added, mean_rstd, weight, bias, partials, t);
    const auto kernel =
        plus ? gradient_kernel<Scalar, kSilu, true> : gradient_kernel<Scalar, kSilu, false>;
    kernel<<<grid, threads, 0, stream>>>(dy, x, added, plus, mean_rstd, weight, bias, partials,
                                         static_cast<uint4*>(a.result), t);
  });
}

}  // namespace eri
