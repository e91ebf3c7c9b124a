// How blocks share a map, for all kernels of group_norm_silu: what is in the kernels' files is the
// arithmetic.
//
// A block takes a tile: some pixels of a sample that follow each other, and of each the channels of
// a slab, which is a whole number of groups and of 16-byte vectors, nearly always all of them. Its
// threads are a grid of pixels by vectors, so that a thread meets the same channels at each of its
// pixels. A first kernel leaves two numbers for each tile and group; each block of a second adds up
// those of its sample, while its first loads are on their way. The second kernel walks its tile
// backwards: what the first kernel read last is still in the L2 cache.
//
// No float atomics and no sum whose order depends on timing: the same input gives the same bits.
#pragma once

#include <algorithm>
#include <numeric>

#include "group_norm_silu.h"
#include "launch.h"
#include "vectors.h"
#include "warp.h"

namespace eri {
namespace {

constexpr int kThreads = 512;                 // of a block, at most
constexpr int kVectors = kGroupNormVectors;   // of a slab, at most
constexpr int kGroups = 256;                  // of a slab, at most
constexpr int kTiles = 128;                   // of a sample, at most
constexpr int kLaneTiles = kTiles / 32;       // that a lane adds up
constexpr int kWarpGroups = 2;                // that a warp adds up at once: their loads overlap
constexpr int kStride = kThreads + 4;         // of per-thread numbers: no bank conflicts

struct Tiling {
  int pixels;       // of a sample
  int channels;     // of a pixel
  int groups;       // of a sample
  int width;        // channels of a group
  int slabs;        // of a pixel
  int slab_groups;  // groups of a slab
  int vectors;      // 16-byte vectors of a slab
  int rows;         // pixels that a block's threads take at once
  int tiles;        // of a sample
  int tile_pixels;  // pixels of a tile; the last one may have fewer
};

// What a thread works on: at = row, row + step, ... below end, in vectors from `first` or, by the
// second kernels, back from `last`.
struct Place {
  int column;     // vector in its slab
  int row;        // its first pixel in the tile, times the vectors of a pixel
  int step;       // from one of its pixels to the next
  int end;        // of the tile's pixels; 0 for a thread that has no part
  int64_t first;  // its vector of the tile's first pixel, in the whole map
  int64_t last;   // and of the last
};

__device__ __forceinline__ int tile_length(const Tiling& t, int tile) {
  return min(t.tile_pixels, t.pixels - tile * t.tile_pixels);
}

template <typename Scalar>
__device__ __forceinline__ Place place(const Tiling& t) {
  const int row = static_cast<int>(threadIdx.x) / t.vectors;
  const int stride = t.channels / Vector<Scalar>::kSize;  // vectors of a pixel
  const int length = tile_length(t, blockIdx.x);
  const int64_t pixel = static_cast<int64_t>(blockIdx.z) * t.pixels + blockIdx.x * t.tile_pixels;
  Place p;
  p.column = static_cast<int>(threadIdx.x) - row * t.vectors;
  p.row = row * stride;
  p.step = t.rows * stride;
  p.end = row < t.rows ? length * stride : 0;
  p.first = pixel * stride + blockIdx.y * t.vectors + p.column;
  p.last = p.first + (length - 1) * stride;
  return p;
}

// ------------------------------------------------------------- numbers for each channel of a slab

// Shared memory for up to four factors of each channel, laid out so that a thread reads those of
// four neighbouring channels at once and a warp reads without bank conflicts.
template <typename Scalar>
struct Table {
  float* numbers;
  int vectors;

  __device__ __forceinline__ void set(int factor, int channel, float value) const {
    constexpr int kSize = Vector<Scalar>::kSize;
    const int line = factor * Vector<Scalar>::kQuads + channel % kSize / 4;
    numbers[(line * vectors + channel / kSize) * 4 + channel % 4] = value;
  }

  // Volatile, so that the compiler reads them anew for each vector instead of keeping all of them
  // in registers, which would leave too few for loads in flight.
  __device__ __forceinline__ void get(int factor, int quad, int column, float (&values)[4]) const {
    const int line = factor * Vector<Scalar>::kQuads + quad;
    const uint32_t at =
        static_cast<uint32_t>(__cvta_generic_to_shared(numbers + (line * vectors + column) * 4));
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
                 : "r"(at)
                 : "memory");
  }
};

template <typename Scalar, int kFactors>
constexpr int kTableSize = kFactors * kVectors * Vector<Scalar>::kSize;

// What the sample of a block has added to each of its pixels: the number of a channel.
template <typename Scalar>
__device__ __forceinline__ float added_to(Rows<const uint4> added, int channel) {
  const uint4* row = added[blockIdx.z];
  return row ? static_cast<float>(reinterpret_cast<const Scalar*>(row)[channel]) : 0.0f;
}

// y = slope * x + offset, where `nearer` is what lies between x and the mean: added - mean.
template <typename Scalar>
__device__ __forceinline__ void set_affine(const Table<Scalar>& table, int channel, float nearer,
                                           float rstd, float weight, float bias) {
  const float slope = weight * rstd;
  table.set(0, channel, slope);
  table.set(1, channel, fmaf(nearer, slope, bias));
}

// --------------------------------------------------------------------- numbers of a block's groups

// Each thread left two numbers for each of its channels in `one` and `two`. This walks those of one
// group, a warp at a time: visit(entry, row, channel in the slab) for rows below `rows`.
template <typename Scalar, typename Visit>
__device__ __forceinline__ void visit_group(const Tiling& t, int group, int rows, Visit visit) {
  constexpr int kSize = Vector<Scalar>::kSize;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row_step = 32 / t.width, channel_step = 32 % t.width;
  int row = lane / t.width, channel = lane % t.width;
  while (row < rows) {
    const int at = group * t.width + channel;
    visit(at % kSize * kStride + row * t.vectors + at / kSize, row, at);
    row += row_step;
    channel += channel_step;
    if (channel >= t.width) {
      channel -= t.width;
      ++row;
    }
  }
}

__device__ __forceinline__ int64_t partial_of(const Tiling& t, int group, int tile) {
  const int64_t of_sample = static_cast<int64_t>(blockIdx.z) * t.groups;
  return (of_sample + blockIdx.y * t.slab_groups + group) * t.tiles + tile;
}

// What the first kernel left of some groups for this lane's tiles, zeros where there is none. A
// warp's groups lie as many apart as the block has warps.
struct Parts {
  float2 of[kWarpGroups][kLaneTiles];

  __device__ __forceinline__ void fetch(const float2* partials, const Tiling& t, int first_group) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
    for (int k = 0; k < kWarpGroups; ++k) {
      const int group = first_group + k * warps;
      const float2* from = partials + partial_of(t, group, lane);
#pragma unroll
      for (int i = 0; i < kLaneTiles; ++i) {
        const bool there = group < t.slab_groups && 32 * i + lane < t.tiles;
        of[k][i] = there ? from[32 * i] : make_float2(0.0f, 0.0f);
      }
    }
  }
};

// ---------------------------------------------------------------------------------------- launches

inline int64_t ceil_divide(int64_t dividend, int64_t divisor) {
  return (dividend + divisor - 1) / divisor;
}

// The largest slabs, and two blocks for each multiprocessor where there is enough to do: a block
// then runs from the first pixels to the last without a second wave behind it.
inline Tiling tiling(const GroupNormArguments& a, int processors) {
  const int64_t size = vector_size(a.type);
  const int64_t width = a.channels / a.groups;
  const int64_t run = std::lcm(width, size);  // channels of the least slab
  const int64_t runs = a.channels / run;
  int64_t of_slab = runs;
  while (runs % of_slab != 0 || of_slab * run > kVectors * size ||
         of_slab * run > kGroups * width) {
    --of_slab;
  }
  Tiling t = {};
  t.pixels = static_cast<int>(a.pixels);
  t.channels = static_cast<int>(a.channels);
  t.groups = static_cast<int>(a.groups);
  t.width = static_cast<int>(width);
  t.slabs = static_cast<int>(runs / of_slab);
  t.slab_groups = static_cast<int>(of_slab * run / width);
  t.vectors = static_cast<int>(of_slab * run / size);
  t.rows = kThreads / t.vectors;
  int64_t tiles = ceil_divide(2 * processors, a.samples * t.slabs);
  tiles = std::min<int64_t>(tiles, ceil_divide(a.pixels, 2 * t.rows));
  tiles = std::min<int64_t>(tiles, kTiles);
  t.tile_pixels = static_cast<int>(ceil_divide(a.pixels, tiles));
  t.tiles = static_cast<int>(ceil_divide(a.pixels, t.tile_pixels));
  return t;
}

inline int block_threads(const Tiling& t) {
  return static_cast<int>(ceil_divide(t.rows * t.vectors, 32) * 32);
}

// Calls launch.operator()<Scalar, kSilu>() for what the arguments say; what CUDA says of it.
template <typename Launch>
const char* with_types(const GroupNormArguments& a, Launch launch) {
  return with_type(a.type, [&]<typename Scalar>() {
    if (a.silu) {
      launch.template operator()<Scalar, true>();
    } else {
      launch.template operator()<Scalar, false>();
    }
  });
}

}  // namespace
}  // namespace eri
