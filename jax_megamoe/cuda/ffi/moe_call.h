// A call of the fused layer as XLA hands it over: its operands and results, bound and checked in one place for all
// handlers and stages. The counterpart of Python's call is primitives/_kernel_call.py.
#pragma once

#include <cstddef>
#include <vector>

#include "host/launch.h"
#include "xla/ffi/api/ffi.h"

namespace megamoe {

namespace ffi = xla::ffi;

class MoeCall {
 public:
  // A handler binds `.RemainingArgs().RemainingRets().Attrs()`, in every stage: sizes of memory follow from the
  // attribute batch_invariant, too. `num_ranks`: of the group that has the experts. `num_more`: operands of the
  // handler's own, after the others. An error where any operand has not the shape and type that go with the others', so
  // that no launch can read out of bounds.
  static ffi::ErrorOr<MoeCall> parse(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                                     const ffi::Dictionary& attributes, int num_ranks, int num_more = 0);

  const Problem& problem() const { return problem_; }
  ffi::AnyBuffer more(int index) const;
  void* workspace() const;

  // Sets problem, layers, operands, results and the two numbers among the attributes: all arguments but workspace,
  // counters and peers. `workspace_bytes`: what the result for scratch has to hold.
  ffi::Error fill(const ffi::Dictionary& attributes, size_t workspace_bytes, MoeArguments* arguments) const;

 private:
  ffi::Error check(int num_ranks);
  ffi::Error choose_order(const ffi::Dictionary& attributes);
  // Of the weights whose leaves begin at operand `first`: whether they have several layers.
  ffi::Error find_stack(size_t first, WeightFormat format, bool* stacked) const;
  // Whether they are of so many experts, those of all layers together.
  ffi::Error check_leaves(size_t first, int64_t experts) const;
  ExpertWeights weights_at(size_t first) const;

  std::vector<ffi::AnyBuffer> operands_, results_;
  bool has_shared_ = false;
  Problem problem_ = {};
  int num_layers_ = 1;
};

}  // namespace megamoe
