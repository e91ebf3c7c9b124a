// Forward: moments of each tile, then the normalised map.

#include "group_norm_tiles.h"

namespace eri {
namespace {

// Leaves mean and sum of squared deviations of each group of the tile. Deviations are from the
// first pixel that a thread meets and then from the tile's mean, so that nothing cancels however
// large the mean is. What is added to a channel moves its mean and none of its deviations.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 2)
    moments_kernel(const uint4* __restrict__ x, Rows<const uint4> added,
                   float2* __restrict__ partials, Tiling t) {
  constexpr int kSize = Vector<Scalar>::kSize, kUnroll = 4;
  __shared__ float means[kSize * kStride], squares[kSize * kStride];
  const Place p = place<Scalar>(t);
  const uint4* from = x + p.first;

  if (p.row < p.end) {
    float shift[kSize], sum[kSize] = {}, square[kSize] = {};
    const Vector<Scalar> start = load<Scalar>(from + p.row);
    const uint4* row = added[blockIdx.z];
    const Vector<Scalar> constant =
        row ? load<Scalar>(row + blockIdx.y * t.vectors + p.column) : zeros<Scalar>();
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float numbers[4];
      unpack(start, quad, numbers);
#pragma unroll
      for (int i = 0; i < 4; ++i) shift[4 * quad + i] = numbers[i];
    }
    const auto add = [&](const Vector<Scalar>& vector) {
#pragma unroll
      for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
        float numbers[4];
        unpack(vector, quad, numbers);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float deviation = numbers[i] - shift[4 * quad + i];
          sum[4 * quad + i] += deviation;
          square[4 * quad + i] = fmaf(deviation, deviation, square[4 * quad + i]);
        }
      }
    };
    int at = p.row;
    for (; at + (kUnroll - 1) * p.step < p.end; at += kUnroll * p.step) {
      Vector<Scalar> vectors[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) vectors[k] = load<Scalar>(from + at + k * p.step);
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) add(vectors[k]);
    }
    for (; at < p.end; at += p.step) add(load<Scalar>(from + at));
    const float share = 1.0f / static_cast<float>((at - p.row) / p.step);  // 1 / its pixels
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float numbers[4];
      unpack(constant, quad, numbers);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * quad + k;
        means[i * kStride + threadIdx.x] = fmaf(sum[i], share, shift[i] + numbers[k]);
        squares[i * kStride + threadIdx.x] = fmaf(-sum[i] * share, sum[i], square[i]);
      }
    }
  }
  __syncthreads();

  const int length = tile_length(t, blockIdx.x), rows = min(t.rows, length);
  const int each = length / t.rows, more = length % t.rows;  // pixels of a row; rows with one more
  for (int group = threadIdx.x / 32; group < t.slab_groups; group += blockDim.x / 32) {
    const int some = group * t.width;  // a channel of the group: near its mean
    const float near = means[some % kSize * kStride + some / kSize];
    float sum = 0.0f, square = 0.0f;
    visit_group<Scalar>(t, group, rows, [&](int entry, int row, int) {
      sum = fmaf(static_cast<float>(each + (row < more)), means[entry] - near, sum);
    });
    const float mean = near + warp_sum(sum) / (static_cast<float>(length) * t.width);
    visit_group<Scalar>(t, group, rows, [&](int entry, int row, int) {
      const float deviation = means[entry] - mean;
      square += fmaf(static_cast<float>(each + (row < more)) * deviation, deviation,
                     squares[entry]);
    });
    square = warp_sum(square);
    if (threadIdx.x % 32 == 0) {
      partials[partial_of(t, group, blockIdx.x)] = make_float2(mean, square);
    }
  }
}

// Mean and 1 / sqrt(variance + eps) of each group of the slab over the whole sample.
__device__ __forceinline__ void finish_moments(const float2* partials, const Tiling& t, float eps,
                                               float2* moments) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  float pixels[kLaneTiles];
#pragma unroll
  for (int i = 0; i < kLaneTiles; ++i) {
    const int tile = 32 * i + lane;
    pixels[i] = tile < t.tiles ? static_cast<float>(tile_length(t, tile)) : 0.0f;
  }
  Parts parts;
  for (int first = threadIdx.x / 32; first < t.slab_groups; first += kWarpGroups * warps) {
    parts.fetch(partials, t, first);
#pragma unroll
    for (int k = 0; k < kWarpGroups; ++k) {
      const float2(&part)[kLaneTiles] = parts.of[k];
      const float near = __shfl_sync(kWarp, part[0].x, 0);
      float sum = 0.0f, square = 0.0f;
#pragma unroll
      for (int i = 0; i < kLaneTiles; ++i) sum = fmaf(pixels[i], part[i].x - near, sum);
      const float mean = near + warp_sum(sum) / static_cast<float>(t.pixels);
#pragma unroll
      for (int i = 0; i < kLaneTiles; ++i) {
        const float deviation = part[i].x - mean;
        square += fmaf(pixels[i] * t.width * deviation, deviation, part[i].y);
      }
      const float variance = warp_sum(square) / (static_cast<float>(t.pixels) * t.width);
      const int group = first + k * warps;
      if (lane == 0 && group < t.slab_groups) {
        moments[group] = make_float2(mean, rsqrtf(variance + eps));
      }
    }
  }
}

template <typename Scalar, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2)
    normalise_kernel(const uint4* __restrict__ x, Rows<const uint4> added,
                     const Scalar* __restrict__ weight, const Scalar* __restrict__ bias,
                     const float2* __restrict__ partials, uint4* __restrict__ y,
                     float2* __restrict__ mean_rstd, float eps, Tiling t) {
  constexpr int kSize = Vector<Scalar>::kSize, kUnroll = 4;
  __shared__ alignas(16) float numbers[kTableSize<Scalar, 2>];
  __shared__ float2 moments[kGroups];
  const Table<Scalar> table = {numbers, t.vectors};
  const Place p = place<Scalar>(t);

  Vector<Scalar> vectors[kUnroll];
  const auto fetch = [&](int at) {
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int back = at + k * p.step;
      if (back < p.end) vectors[k] = load_last<Scalar>(x + p.last - back);
    }
  };
  fetch(p.row);

  finish_moments(partials, t, eps, moments);
  __syncthreads();
  const int first_channel = blockIdx.y * t.vectors * kSize;
#pragma unroll 1
  for (int channel = threadIdx.x; channel < t.vectors * kSize; channel += blockDim.x) {
    const float2 of_group = moments[channel / t.width];
    set_affine(table, channel, added_to<Scalar>(added, first_channel + channel) - of_group.x,
               of_group.y, static_cast<float>(weight[first_channel + channel]),
               static_cast<float>(bias[first_channel + channel]));
  }
  if (blockIdx.x == 0) {
    for (int group = threadIdx.x; group < t.slab_groups; group += blockDim.x) {
      mean_rstd[blockIdx.z * t.groups + blockIdx.y * t.slab_groups + group] = moments[group];
    }
  }
  __syncthreads();

#pragma unroll 1
  for (int at = p.row; at < p.end; at += kUnroll * p.step) {
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float slope[4], offset[4];
      table.get(0, quad, p.column, slope);
      table.get(1, quad, p.column, offset);
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        float out[4];
        unpack(vectors[k], quad, out);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          out[i] = fmaf(slope[i], out[i], offset[i]);
          if (kSilu) out[i] *= reciprocal<Scalar>(1.0f + exponential<Scalar>(-out[i]));
        }
        pack(vectors[k], quad, out);
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int back = at + k * p.step;
      if (back < p.end) store(y + p.last - back, vectors[k]);
    }
    fetch(at + kUnroll * p.step);
  }
}

}  // namespace

int64_t group_norm_workspace(const GroupNormArguments& arguments) {
  const Tiling t = tiling(arguments, multiprocessors());
  return 2 * arguments.samples * arguments.groups * t.tiles;
}

const char* launch_group_norm(const GroupNormArguments& a, void* stream_handle) {
  const Tiling t = tiling(a, multiprocessors());
  const dim3 grid(t.tiles, t.slabs, static_cast<unsigned int>(a.samples));
  const int threads = block_threads(t);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const uint4* x = static_cast<const uint4*>(a.x);
  float2* partials = reinterpret_cast<float2*>(a.workspace);
  return with_types(a, [&]<typename Scalar, bool kSilu>() {
    const Rows<const uint4> added = rows_of<Scalar>(a.added, a.added_stride);
    moments_kernel<Scalar><<<grid, threads, 0, stream>>>(x, added, partials, t);
    normalise_kernel<Scalar, kSilu><<<grid, threads, 0, stream>>>(
        x, added, static_cast<const Scalar*>(a.weight), static_cast<const Scalar*>(a.bias),
        partials, static_cast<uint4*>(a.result), reinterpret_cast<float2*>(a.mean_rstd),
        static_cast<float>(a.eps), t);
  });
}

}  // namespace eri
