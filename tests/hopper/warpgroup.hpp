// Behind machine.hpp and overlap.hpp, in place of warpgroup.cuh: products are computed when they
// are awaited, from shared memory as it is then.

template <int COUNT>
void take_registers() {}
template <int COUNT>
void leave_registers() {}

inline u64 described(u32 address) { return address; }
inline u64 described_turned(u32 address, u32 apart) { return u64(apart) << 32 | address; }
inline void begin_products() {}
inline void commit_products() {
    running->groups.push_back(std::move(running->group));
    running->group.clear();
}
template <int N>
void pinned(float (&)[N]) {}

inline float element(u32 base, int row, int k) {
    u16 bits;
    std::memcpy(&bits, place(swizzled(base + row * 128 + k * 2)), 2);
    return widen_one(bits);
}

// Factors in shared memory; what is w's, where it is held, comes from other lanes of the warp.
inline void multiply(Fiber* fiber, size_t group, size_t number) {
    const Tile& p = fiber->groups[group][number];
    const int warp = fiber->thread / 32 % 4, lane = fiber->thread % 32;
    for (int i = 0; i < p.columns / 2; ++i) {
        const int high = i / 2 % 2, row = lane / 4 + high * 8;
        const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = p.added ? p.sum[i] : 0.0f;
        for (int k = 0; k < 16; ++k) {
            float w;
            if (p.w) {
                w = element(p.w, warp * 16 + row, k);
            } else {
                const Fiber* other = fiber - lane + row % 8 * 4 + k % 8 / 2;
                const uint4& held = other->groups[group][number].held;
                const u32 words[] = {held.x, held.y, held.z, held.w};
                w = widen_one(words[high + k / 8 * 2] >> k % 2 * 16);
            }
            sum += w * (p.turned ? element(p.x + column / 64 * p.apart, k, column % 64)
                                 : element(p.x, column, k));
        }
        p.sum[i] = sum;
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
            for (size_t i = 0; i < fiber->groups[fiber->multiplied].size(); ++i)
                multiply(fiber, fiber->multiplied, i);
}

template <bool TURNED, bool ADDED>
void enqueue_held(float* sum, int columns, uint4 w, u64 x) {
    running->group.push_back({sum, 0, u32(x), w, columns, TURNED, ADDED, u32(x >> 32)});
}
template <bool TURNED, bool ADDED>
void multiply_held(float (&sum)[32], uint4 w, u64 x) {
    enqueue_held<TURNED, ADDED>(sum, 64, w, x);
}
template <bool TURNED, bool ADDED>
void multiply_held(float (&sum)[64], uint4 w, u64 x) {
    enqueue_held<TURNED, ADDED>(sum, 128, w, x);
}

template <bool ADDED, int N>
void multiply_shared(float (&sum)[N], u64 w, u64 x) {
    running->group.push_back({sum, u32(w), u32(x), {}, 2 * N, false, ADDED});
}

#ifdef BLOCK_M
constexpr int HELD = BLOCK_M / 2;

inline void multiply_tile(float (&sum)[HELD], u64 w, u64 x) {
    running->group.push_back({sum, u32(w), u32(x), {}, BLOCK_M});
}
#endif
