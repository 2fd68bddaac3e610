// The CPU kernels of linear_adapter without PyTorch, for emulator.py: calls come on standard input,
// their results go to standard output.
//
// A call is struct Call, then its arrays (a count of bytes, and the bytes), then the sizes of its
// results; the count -1 stands for null. Stacked weights, and their gradients, are one array for
// each kind, as they are for the op.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/linear_adapter.h"

namespace adapter_ext {
namespace {

struct Call {
  int64_t backward, threads, data_type, weight_type, operand_type, activation, norm_position,
      depth_mode, residual, rows, hidden_size, largest_bottleneck, samples, adapters, stacked;
  double eps, dropout, stochastic_depth;
};

bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

// The arrays of a call, each in memory of its own of exactly its size.
class Arrays {
 public:
  const char* input() {
    const Array array = add(inputs_);
    if (!read(array.memory, array.bytes)) std::abort();
    return array.memory;
  }
  const int64_t* input_of_integers() { return reinterpret_cast<const int64_t*>(input()); }
  char* output() {
    const Array array = add(outputs_);
    std::fill_n(array.memory, array.bytes, '\xff');  // NaN
    return array.memory;
  }
  void write_outputs() const {
    for (const Array& array : outputs_) std::fwrite(array.memory, 1, array.bytes, stdout);
    std::fflush(stdout);
  }

 private:
  struct Array {
    char* memory = nullptr;
    size_t bytes = 0;
  };

  Array add(std::vector<Array>& arrays) {
    int64_t bytes;
    if (!read(&bytes, sizeof(bytes))) std::abort();
    Array array;
    if (bytes >= 0) {
      array.bytes = static_cast<size_t>(bytes);
      array.memory = memory_.emplace_back(new char[array.bytes]).get();
    }
    arrays.push_back(array);
    return array;
  }

  std::vector<std::unique_ptr<char[]>> memory_;
  std::vector<Array> inputs_, outputs_;
};

// How many threads there are decides how the work is divided; one can do all of it.
void run_in_turn(int64_t tasks, void (*body)(int64_t, void*), void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(task, context);
}

void run(const Call& call) {
  const cpu::Parallel parallel{call.threads, run_in_turn};
  Arrays arrays;
  LinearAdapterProblem problem{};
  problem.data_type = static_cast<DataType>(call.data_type);
  problem.weight_type = static_cast<DataType>(call.weight_type);
  problem.operand_type = static_cast<DataType>(call.operand_type);
  problem.activation = static_cast<Activation>(call.activation);
  problem.norm_position = static_cast<NormPosition>(call.norm_position);
  problem.depth_mode = static_cast<DepthMode>(call.depth_mode);
  problem.residual = call.residual != 0;
  problem.eps = call.eps;
  problem.dropout = call.dropout;
  problem.stochastic_depth = call.stochastic_depth;
  problem.rows = call.rows;
  problem.hidden_size = call.hidden_size;
  problem.largest_bottleneck = call.largest_bottleneck;
  problem.routing.adapters = call.adapters;
  problem.routing.samples = call.samples;
  problem.routing.rows_per_sample = call.samples ? call.rows / call.samples : 0;
  problem.routing.order = arrays.input_of_integers();
  problem.routing.offsets = arrays.input_of_integers();
  problem.l2_lambda = arrays.input();
  problem.seed = arrays.input_of_integers();

  const int64_t* bottlenecks = arrays.input_of_integers();
  const size_t adapters = static_cast<size_t>(call.adapters);
  std::vector<AdapterView> views(call.stacked ? 1 : adapters);
  views.reserve(1);  // a list is not null
  for (const auto kind :
       {&AdapterView::norm_weight, &AdapterView::norm_bias, &AdapterView::down, &AdapterView::up}) {
    for (AdapterView& view : views) view.*kind = arrays.input();
  }
  for (size_t a = 0; a < views.size(); ++a) {
    views[a].bottleneck = views[a].up_stride = bottlenecks[a];
    views[a].down_stride = call.hidden_size;
  }
  const int64_t vector = call.hidden_size * size_of(problem.weight_type);
  const int64_t matrix = call.largest_bottleneck * vector;
  if (call.stacked) {
    problem.adapters = {nullptr, views[0], vector, vector, matrix, matrix};
  } else {
    problem.adapters.list = views.data();
  }

  if (!call.backward) {
    LinearAdapterForward forward{};
    static_cast<LinearAdapterProblem&>(forward) = problem;
    forward.x = arrays.input();
    forward.y = arrays.output();
    forward.aux = arrays.output();
    forward.hidden = arrays.output();
    forward.mean = arrays.output();
    forward.rstd = arrays.output();
    cpu::linear_adapter(forward, parallel);
  } else {
    LinearAdapterBackward backward{};
    static_cast<LinearAdapterProblem&>(backward) = problem;
    backward.x = arrays.input();
    backward.grad_y = arrays.input();
    backward.grad_aux = arrays.input();
    backward.hidden = arrays.input();
    backward.mean = arrays.input();
    backward.rstd = arrays.input();
    backward.grad_x = arrays.output();
    std::vector<AdapterGradients> gradients(adapters);
    const auto set = [&](void* AdapterGradients::* kind, int64_t step) {
      char* stack = call.stacked ? arrays.output() : nullptr;
      for (size_t a = 0; a < adapters; ++a) {
        if (!call.stacked) {
          gradients[a].*kind = arrays.output();
        } else if (stack) {
          gradients[a].*kind = stack + static_cast<int64_t>(a) * step;
        }
      }
    };
    set(&AdapterGradients::norm_weight, vector);
    set(&AdapterGradients::norm_bias, vector);
    set(&AdapterGradients::down, matrix);
    set(&AdapterGradients::up, matrix);
    backward.gradients = gradients.data();
    cpu::linear_adapter(backward, parallel);
  }
  arrays.write_outputs();
}

}  // namespace
}  // namespace adapter_ext

int main() {
  adapter_ext::Call call;
  while (adapter_ext::read(&call, sizeof(call))) adapter_ext::run(call);
}
