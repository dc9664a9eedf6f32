// What the Python module registers with XLA.
#pragma once

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace megamoe {

XLA_FFI_DECLARE_HANDLER_SYMBOL(MoeInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(MoeInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(MoeExecute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(MoePeersInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(MoePeersPrepare);
XLA_FFI_DECLARE_HANDLER_SYMBOL(MoePeersInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(MoePeersExecute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(VirtualRanksInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(VirtualRanksInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(VirtualRanksExecute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(ReadCeiling);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WireTestInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WireTestPrepare);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WireTestInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WireTestExecute);

// Types of the states that call sites keep between executions.
void* moe_instance_type_id();
void* moe_instance_type_info();
void* moe_peers_instance_type_id();
void* moe_peers_instance_type_info();
void* virtual_ranks_instance_type_id();
void* virtual_ranks_instance_type_info();
void* wire_test_instance_type_id();
void* wire_test_instance_type_info();

// How often the execute handler ran in this process: a replayed command buffer does not call it.
int64_t moe_execute_count();

}  // namespace megamoe
