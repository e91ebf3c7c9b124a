// Attention to few keys; see eri/layers/cross_attention.py.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace eri {

constexpr int kCrossAttentionKeys = 256;  // at most

struct CrossAttentionArguments {
  const void* q;            // [batch, queries, heads * size]; 16-byte aligned like all that follow
  const void* kv;           // [batch, keys, 2 * heads * size]: keys, then values
  const void* d_o;          // like q; null in the forward pass
  void* o;                  // like q; null in the backward pass
  void* dq;                 // [batch * queries, dq_stride]; the first heads * size are written
  void* dkv;                // like kv
  float* work;              // for the backward pass, as long as cross_attention_work says
  FloatType type;           // of all but work; not float32
  int batch;                //
  int queries;              // of a sample; queries * dq_stride < 2^31
  int keys;                 // of a sample, 1 to kCrossAttentionKeys
  int heads;                //
  int size;                 // of a head: 40, 64, 80 or 160
  int64_t dq_stride;        // numbers from one row to the next, a multiple of 8
};

// Each queues its kernels on a cudaStream_t; returns null, or what CUDA says is wrong.
const char* launch_cross_attention(const CrossAttentionArguments& arguments, void* stream);
const char* launch_cross_attention_backward(const CrossAttentionArguments& arguments, void* stream);

// Numbers of float32 that the backward pass needs on the current device.
int64_t cross_attention_work(const CrossAttentionArguments& arguments);

}  // namespace eri
