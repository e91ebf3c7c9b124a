// Attention to few keys; see eri/layers/cross_attention.py.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace eri {

constexpr int kCrossAttentionKeys = 256;  // at most

struct CrossAttentionArguments {
  const void* q;            // [batch, queries, heads * size]; 16-byte aligned like all that follow
  const void* kv;           // [batch * keys, kv_stride]; 2 * heads * size: keys, then values
  const void* d_o;          // like q; null in the forward pass
  void* result;             // o or dq, [batch * queries, result_stride]; heads * size are written
  void* dkv;                // [batch * keys, dkv_stride], like kv
  float* work;              // for the backward pass, as long as plan_... says
  FloatType type;           // of all but work; not float32
  int batch;                //
  int queries;              // of a sample; queries * result_stride < 2^31
  int keys;                 // of a sample, 1 to kCrossAttentionKeys
  int heads;                //
  int size;                 // of a head: 40, 64, 80 or 160
  int kv_stride;            // numbers from one row to the next; multiples of 8
  int dkv_stride;           // keys * of both < 2^31
  int result_stride;        //
  int strips;               // of queries in the backward pass: what plan_... has found
};

// Each queues its kernels on a cudaStream_t; returns null, or what CUDA says is wrong.
const char* launch_cross_attention(const CrossAttentionArguments& arguments, void* stream);
const char* launch_cross_attention_backward(const CrossAttentionArguments& arguments, void* stream);

// Settles the backward pass on the current device, and tells how many numbers of float32 it needs.
const char* plan_cross_attention_backward(CrossAttentionArguments& arguments, int64_t* work);

}  // namespace eri
