// 16 bytes of memory and the numbers they hold: what every bandwidth-bound kernel reads and writes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace eri {

// One load or store of a thread. Quarters are taken four numbers at a time, which keeps few of them
// in registers at once; a quarter must be known when compiling, or `words` leaves the registers.
template <typename Scalar>
struct Vector {
  static constexpr int kSize = 16 / sizeof(Scalar);  // numbers in it: 8, or 4 of float
  static constexpr int kQuads = kSize / 4;
  uint32_t words[4];
};

template <typename Scalar>
__device__ __forceinline__ Vector<Scalar> from_words(uint4 words) {
  return {{words.x, words.y, words.z, words.w}};
}

template <typename Scalar>
__device__ __forceinline__ Vector<Scalar> zeros() {
  return {{0u, 0u, 0u, 0u}};
}

template <typename Scalar>
__device__ __forceinline__ Vector<Scalar> load(const uint4* from) {
  return from_words<Scalar>(__ldg(from));
}

// The same for what is not read again: it gives up its place in the caches first.
template <typename Scalar>
__device__ __forceinline__ Vector<Scalar> load_last(const uint4* from) {
  return from_words<Scalar>(__ldcs(from));
}

template <typename Scalar>
__device__ __forceinline__ void store(uint4* to, const Vector<Scalar>& vector) {
  *to = make_uint4(vector.words[0], vector.words[1], vector.words[2], vector.words[3]);
}

// Rows of vectors, `stride` of them from one to the next; `Word` is const where they are read.
template <typename Word>
struct Rows {
  Word* first;
  int64_t stride;
  __device__ __forceinline__ Word* operator[](uint32_t row) const { return first + row * stride; }
};

// From elements between rows to vectors.
template <typename Scalar>
Rows<const uint4> rows_of(const void* first, int64_t stride) {
  return {static_cast<const uint4*>(first), stride / Vector<Scalar>::kSize};
}

template <typename Scalar>
Rows<uint4> rows_of(void* first, int64_t stride) {
  return {static_cast<uint4*>(first), stride / Vector<Scalar>::kSize};
}

__device__ __forceinline__ void unpack(const Vector<float>& vector, int, float (&numbers)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) numbers[i] = __uint_as_float(vector.words[i]);
}

__device__ __forceinline__ void unpack(const Vector<__nv_bfloat16>& vector, int quad,
                                       float (&numbers)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t word = vector.words[2 * quad + i];
    numbers[2 * i] = __uint_as_float(word << 16);
    numbers[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
  }
}

__device__ __forceinline__ void unpack(const Vector<__half>& vector, int quad,
                                       float (&numbers)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t word = vector.words[2 * quad + i];
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    numbers[2 * i] = pair.x;
    numbers[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ void pack(Vector<float>& vector, int, const float (&numbers)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) vector.words[i] = __float_as_uint(numbers[i]);
}

__device__ __forceinline__ void pack(Vector<__nv_bfloat16>& vector, int quad,
                                     const float (&numbers)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(numbers[2 * i], numbers[2 * i + 1]);
    vector.words[2 * quad + i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
}

__device__ __forceinline__ void pack(Vector<__half>& vector, int quad, const float (&numbers)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const __half2 pair = __floats2half2_rn(numbers[2 * i], numbers[2 * i + 1]);
    vector.words[2 * quad + i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// e^x and 1/x. 16-bit results are far coarser than the 2^-22 of the hardware's own functions.
template <typename Scalar>
__device__ __forceinline__ float exponential(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}
template <>
__device__ __forceinline__ float exponential<float>(float x) {
  return expf(x);
}

template <typename Scalar>
__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
template <>
__device__ __forceinline__ float reciprocal<float>(float x) {
  return 1.0f / x;
}

}  // namespace eri
