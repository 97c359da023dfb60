// Behind machine.hpp and overlap.hpp, in place of cluster.cuh.

inline void send(u32 to, u32 from, u32 bytes, u32 barrier) {
    from = far_address(from);
    enqueue([=] {
        reach(from), std::memcpy(place(to), place(from), bytes), arrive_bytes(barrier, bytes);
    });
}

inline void cluster_arrive() {
    running->cluster_generation = cluster_barrier.generation;
    cluster_barrier.arrive(fibers.size()), ++moved;
}
inline void cluster_wait() {
    wait_until([] { return cluster_barrier.generation != running->cluster_generation; });
}
