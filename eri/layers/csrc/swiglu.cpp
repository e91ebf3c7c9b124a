// Checks of `eri::swiglu` and `eri::swiglu_backward` and their CUDA implementation; the schemas are
// in eri/layers/swiglu.py.

#include "swiglu.h"

#include <tuple>

#include "op.h"

namespace eri {
namespace {

const Op op = {"swiglu"};

// Numbers like the gates.
const void* check_like_gate(const char* name, const Tensor& found, const Tensor& gate) {
  op.check_kind(name, found, gate.get_device_index(), gate.scalar_type());
  op.check_dense(name, found, gate.numel());
  return found.const_data_ptr();
}

SwigluArguments arguments_of(const Tensor& gate, const Tensor& value) {
  SwigluArguments arguments = {};
  arguments.type = op.float_type("gate", gate);
  arguments.elements = gate.numel();
  arguments.gate = check_like_gate("gate", gate, gate);
  arguments.value = check_like_gate("value", value, gate);
  const int64_t vector = vector_size(arguments.type);
  STD_TORCH_CHECK(gate.numel() % vector == 0 && gate.numel() < kSwigluElements,
                  "swiglu: gate has ", gate.numel(), " elements, expected a multiple of ", vector,
                  ", less than ", kSwigluElements);
  return arguments;
}

Tensor swiglu(const Tensor& gate, const Tensor& value) {
  SwigluArguments arguments = arguments_of(gate, value);
  const DeviceGuard guard(gate.get_device_index());
  Tensor y = torch::stable::new_empty(gate, gate.sizes());
  arguments.result = y.mutable_data_ptr();
  op.check_launch(launch_swiglu(arguments, current_stream(gate.get_device_index())));
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy, const Tensor& gate,
                                           const Tensor& value) {
  SwigluArguments arguments = arguments_of(gate, value);
  arguments.dy = check_like_gate("dy", dy, gate);
  const DeviceGuard guard(gate.get_device_index());
  Tensor d_gate = torch::stable::new_empty(gate, gate.sizes());
  Tensor d_value = torch::stable::new_empty(gate, gate.sizes());
  arguments.d_gate = d_gate.mutable_data_ptr();
  arguments.d_value = d_value.mutable_data_ptr();
  op.check_launch(launch_swiglu(arguments, current_stream(gate.get_device_index())));
  return {d_gate, d_value};
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("swiglu", TORCH_BOX(&eri::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&eri::swiglu_backward));
}
