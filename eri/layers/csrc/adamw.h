// Clip, AdamW and zeroed gradient over flat parameters; see eri/layers/adamw.py.
#pragma once

#include <cstdint>

namespace eri {

// Places of the control block, the same as `Control` in eri/layers/adamw.py.
enum Control : int {
  kLr = 0,        // learning rate
  kShare = 1,     // 1 / samples of the step; not read here
  kStep = 2,      // number of the step, from 1
  kLoss = 3,      // of the step
  kGradNorm = 4,  // written: norm of the gradient before clipping
  kScale = 5,     // of the loss
  kGrowth = 6,    // updates since the scale changed
  kUpdates = 7,   // updates done
  kBad = 8,       // step that was not finite, or 0
  kControlSize = 16,
};

constexpr int64_t kAdamwWorkspaceBytes = 16384;

struct AdamwArguments {
  float* master;         // [n], 16-byte aligned like all that follow
  float* exp_avg;        // [n]
  float* exp_avg_sq;     // [n]
  float* grad;           // [n]
  float* control;        // [kControlSize]
  void* workspace;       // kAdamwWorkspaceBytes, zero before its first use
  int64_t n;             // elements
  double beta1;          // decay of the mean
  double beta2;          // decay of the mean square
  double eps;            // added to the root
  double weight_decay;   // share of a parameter that one unit of lr takes away
  double max_grad_norm;  // infinity: no clipping
  int64_t growth_interval;  // updates until the scale doubles; 0: no loss scaling
};

// Queues two kernels on a cudaStream_t; returns null, or what CUDA says is wrong.
const char* launch_adamw(const AdamwArguments& arguments, void* stream);

}  // namespace eri
