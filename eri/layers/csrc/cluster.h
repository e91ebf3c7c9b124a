// Clusters of blocks, which read each other's shared memory; cards have them from sm_90 on. Code
// for older ones is launched with one block a cluster.
#pragma once

#include <cooperative_groups.h>

#include "launch.h"

namespace eri {

constexpr int kFirstWithClusters = 90;  // __CUDA_ARCH__ / 10: ptxVersion of cudaFuncAttributes
constexpr int kMostOfCluster = 8;       // blocks, on every card

// The place in block `which` of the cluster that `mine` is in this one.
__device__ __forceinline__ const float* shared_of_cluster(const float* mine, int which,
                                                          int blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) return cooperative_groups::this_cluster().map_shared_rank(mine, which);
#endif
  return mine;
}

__device__ __forceinline__ void wait_for_cluster(int blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    cooperative_groups::this_cluster().sync();
    return;
  }
#endif
  __syncthreads();
}

// Queues `count` clusters of so many blocks side by side, with so many bytes of shared memory each.
template <typename Kernel, typename Arguments>
cudaError_t launch_clusters(Kernel kernel, int count, int blocks, int threads, int bytes,
                            cudaStream_t stream, const Arguments& arguments) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned int>(blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned int>(count * blocks));
  config.blockDim = dim3(static_cast<unsigned int>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = blocks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace eri
