// Checks of `eri::lora_copies` and its CUDA implementation; the schema is in
// eri/layers/lora_copies.py.

#include "lora_copies.h"

#include "op.h"

namespace eri {
namespace {

const Op op = {"lora_copies"};

void lora_copies(const Tensor& table, int64_t type) {
  STD_TORCH_CHECK(table.is_cuda() && table.is_contiguous() && table.dim() == 2 &&
                      table.size(1) == kMatrixCopyNumbers &&
                      table.scalar_type() == ScalarType::Long,
                  "lora_copies: the table is not [copies, ", kMatrixCopyNumbers,
                  "] int64 on a CUDA device");
  STD_TORCH_CHECK(0 <= type && type <= 2, "lora_copies: there is no type ", type);
  const DeviceGuard guard(table.get_device_index());
  op.check_launch(launch_lora_copies(table.const_data_ptr(), table.size(0),
                                     static_cast<FloatType>(type),
                                     current_stream(table.get_device_index())));
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) { m.impl("lora_copies", TORCH_BOX(&eri::lora_copies)); }
