// Launches that overlap, and copies of boxes of a matrix to shared memory. Behind machine.cuh.

struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ void let_next_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void await_last() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Of copies: what they bring leaves the L2 cache first.
__device__ __forceinline__ u64 leaving_first() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// A box of 64 inner elements and some rows from `row`.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, int inner, int row,
                                         u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(inner), "r"(row), "r"(barrier), "l"(policy)
        : "memory");
}

// Boxes of 64 inner elements one after the other, from the chunk-th of a row.
__device__ __forceinline__ void copy_chunks(u32 to, const TensorMap& map, int row, int chunk,
                                            u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
        "l"(&map), "r"(0), "r"(row), "r"(chunk), "r"(barrier)
        : "memory");
}

// Ordinary writes to this program's shared memory before it are seen by asynchronous copies after
// it. (Unlike fence_copies it waits for no write to global memory.)
__device__ __forceinline__ void fence_shared_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Barriers that were just made are seen by the other programs and by copies.
__device__ __forceinline__ void fence_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_shared_copies();
}
