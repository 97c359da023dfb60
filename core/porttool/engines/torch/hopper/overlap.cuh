// Launches that overlap, and copies of boxes of a matrix to shared memory. Behind machine.cuh.

struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ void let_next_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void await_last() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// As another program left it, past this multiprocessor's own cache.
__device__ __forceinline__ float4 read_fresh(const float* from) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from));
    return v;
}

__device__ __forceinline__ u32 read_fresh(const u32* from) {
    u32 now;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(from) : "memory");
    return now;
}

// Wait until all of some programs have come, which see then what each wrote. The last to go leaves
// the count at zero, as it was. By one thread, between barriers.
__device__ __forceinline__ void meet_programs(u32* count, u32 programs) {
    fence_all();
    count_up(count);
    while (read_fresh(count) < programs) {
    }
    fence_all();
    if (count_up(count) == 2 * programs - 1) *count = 0;
}

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

// A box of a tensor with three sides.
__device__ __forceinline__ void copy_cube(u32 to, const TensorMap& map, int x, int y, int z,
                                          u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}

// Boxes of 64 inner elements one after the other, from the chunk-th of a row.
__device__ __forceinline__ void copy_chunks(u32 to, const TensorMap& map, int row, int chunk,
                                            u32 barrier) {
    copy_cube(to, map, 0, row, chunk, barrier);
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
