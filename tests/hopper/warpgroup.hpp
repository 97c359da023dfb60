// Behind machine.hpp and overlap.hpp, in place of warpgroup.cuh: products are computed when they
// are awaited, from shared memory as it is then.

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
