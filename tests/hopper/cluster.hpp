// Behind machine.hpp, in place of cluster.cuh: copies swizzle, and products are computed when they
// are awaited, from shared memory as it is then.

struct alignas(64) TensorMap {
    u64 words[16];  // address, three sides, two strides in bytes, three sides of a box
};

inline void let_next_start() {}
inline void await_last() {
    wait_until([] { return preceded; });
}
inline u64 leaving_first() { return 0; }
inline void fence_barriers() {}
inline void fence_shared_copies() {}

inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_cube(u32 to, const TensorMap& map, int x, int y, int z, u32 barrier) {
    to = far_address(to), barrier = far_address(barrier);
    const u64* m = map.words;
    enqueue([=] {
        for (u32 k = 0, at = 0; k < m[8]; ++k)
            for (u32 j = 0; j < m[7]; ++j)
                for (u32 i = 0; i < m[6]; ++i, at += 2) {
                    const bool inside = x + i < m[1] && y + j < m[2] && z + k < m[3];
                    const char* from = reinterpret_cast<const char*>(m[0]) + (x + i) * 2 +
                                       (y + j) * m[4] + (z + k) * m[5];
                    const u16 zero = 0;
                    std::memcpy(place(swizzled(to + at)),
                                inside ? from : reinterpret_cast<const char*>(&zero), 2);
                }
        arrive_bytes(barrier, m[6] * m[7] * m[8] * 2);
    });
}
inline void copy_box(u32 to, const TensorMap& map, int inner, int row, u32 barrier, u64) {
    copy_cube(to, map, inner, row, 0, barrier);
}
inline void copy_chunks(u32 to, const TensorMap& map, int row, int chunk, u32 barrier) {
    copy_cube(to, map, 0, row, chunk, barrier);
}

inline void send(u32 to, u32 from, u32 bytes, u32 barrier) {
    from = far_address(from);
    enqueue([=] { std::memcpy(place(to), place(from), bytes), arrive_bytes(barrier, bytes); });
}

inline void cluster_arrive() {
    running->cluster_generation = cluster_barrier.generation;
    cluster_barrier.arrive(fibers.size()), ++moved;
}
inline void cluster_wait() {
    wait_until([] { return cluster_barrier.generation != running->cluster_generation; });
}

constexpr int HELD = BLOCK_M / 2;

inline u64 described(u32 address) { return address; }
inline void begin_products() {}
inline void multiply_tile(float (&sum)[HELD], u64 w, u64 x) {
    running->group.push_back({sum, static_cast<u32>(w), static_cast<u32>(x)});
}
inline void commit_products() {
    running->groups.push_back(std::move(running->group));
    running->group.clear();
}
inline float element(u32 base, int row, int k) {
    u16 bits;
    std::memcpy(&bits, place(swizzled(base + row * 128 + k * 2)), 2);
    return widen_one(bits);
}
inline void multiply(const Fiber& fiber, const Tile& p) {
    const int warp = fiber.thread / 32 % 4, lane = fiber.thread % 32;
    for (int i = 0; i < HELD; ++i) {
        const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
        const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) p.sum[i] += element(p.w, row, k) * element(p.x, column, k);
    }
}
// A warpgroup's products are one operation: where one thread sees its end, they are all done.
template <int LEFT>
void await_products() {
    Fiber* first = running - running->thread % 128;
    const size_t wanted = running->groups.size() - LEFT;
    pause();
    for (Fiber* fiber = first; fiber < first + 128; ++fiber)
        wait_until([&] { return fiber->groups.size() >= wanted; });
    for (Fiber* fiber = first; fiber < first + 128; ++fiber)
        for (; fiber->multiplied < wanted; ++fiber->multiplied)
            for (const Tile& p : fiber->groups[fiber->multiplied]) multiply(*fiber, p);
}
inline void pinned(float (&)[HELD]) {}
