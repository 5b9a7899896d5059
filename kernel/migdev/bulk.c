// SPDX-License-Identifier: GPL-2.0
/*
 * The bulk state: pages {number, generation, sum, payload} that keep changing and say themselves whether they are
 * whole. The sum over all generations travels at the stream's end: by it a stale page is found.
 */
#include <linux/bitmap.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/vmalloc.h>

#include "migdev.h"

#define WORDS	(BULK_PAGE / 8)
#define GOLDEN	0x9e3779b97f4a7c15ull
/* Most pages changed, or swept, under one hold of the lock. */
#define SLICE	64

static u64 mix(u64 page, u64 generation)
{
	u64 z = page * GOLDEN ^ (generation + GOLDEN);

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	return z ^ z >> 31;
}

static __le64 *page_at(struct migdev *dev, u64 page)
{
	return (__le64 *)(dev->bulk + page * BULK_PAGE);
}

static u64 page_sum(const __le64 *words)
{
	unsigned int k;
	u64 sum = 0;

	for (k = 0; k < WORDS; k++)
		if (k != 2)
			sum += le64_to_cpu(words[k]);
	return sum;
}

static void page_fill(struct migdev *dev, u64 page, u64 generation)
{
	__le64 *words = page_at(dev, page);
	u64 seed = mix(page, generation);
	unsigned int k;

	words[0] = cpu_to_le64(page);
	words[1] = cpu_to_le64(generation);
	for (k = 3; k < WORDS; k++)
		words[k] = cpu_to_le64(seed + k * GOLDEN);
	words[2] = cpu_to_le64(page_sum(words));
	__clear_bit(page, dev->damaged);
}

static void page_check(struct migdev *dev, u64 page)
{
	__le64 *words = page_at(dev, page);

	if (le64_to_cpu(words[0]) == page && le64_to_cpu(words[2]) == page_sum(words))
		return;
	if (!__test_and_set_bit(page, dev->damaged))
		WRITE_ONCE(dev->set[INTEGRITY], dev->set[INTEGRITY] + 1);
}

/* Back to fresh, healthy state. */
void bulk_renew(struct migdev *dev)
{
	u64 page;

	dev->generations = 0;
	for (page = 0; page < bulk_pages(dev); page++) {
		page_fill(dev, page, 1);
		dev->generations += mix(page, 1);
	}
	WRITE_ONCE(dev->set[INTEGRITY], 0);
	dev->sweep = bulk_pages(dev);
	dev->check_cursor = 0;
}

/* For an instance that nobody has open. */
int bulk_resize(struct migdev *dev, u64 size)
{
	unsigned long *damaged;
	u8 *bulk;

	if (size % BULK_PAGE)
		return -EINVAL;
	bulk = vzalloc(max(size, (u64)BULK_PAGE));
	damaged = bitmap_zalloc(size / BULK_PAGE + 1, GFP_KERNEL);
	if (!bulk || !damaged) {
		vfree(bulk);
		bitmap_free(damaged);
		return -ENOMEM;
	}
	mutex_lock(&dev->lock);
	bulk_free(dev);
	dev->bulk = bulk;
	dev->damaged = damaged;
	dev->set[STATE_SIZE] = size;
	dev->random = 0x5eed5eed5eed5eedull;
	bulk_renew(dev);
	mutex_unlock(&dev->lock);
	return 0;
}

void bulk_free(struct migdev *dev)
{
	vfree(dev->bulk);
	bitmap_free(dev->damaged);
}

void bulk_check_some(struct migdev *dev, unsigned int count)
{
	u64 pages = bulk_pages(dev);

	while (pages && count--) {
		page_check(dev, dev->check_cursor);
		dev->check_cursor = (dev->check_cursor + 1) % pages;
	}
}

static void churn_one(struct migdev *dev)
{
	struct session *s = dev->session;
	u64 page, old;

	dev->random ^= dev->random << 13;
	dev->random ^= dev->random >> 7;
	dev->random ^= dev->random << 17;
	page = dev->random % bulk_pages(dev);
	/* Looked at before it is overwritten, so that no damage is painted over. */
	page_check(dev, page);
	old = le64_to_cpu(page_at(dev, page)[1]);
	page_fill(dev, page, old + 1);
	dev->generations += mix(page, old + 1) - mix(page, old);
	/* What the initial pass has yet to reach is sent by it. */
	if (s && s->saving && page < s->cursor)
		__set_bit(page, s->pages);
}

/* Changes what has become due and goes on with a sweep. Returns whether there is more to do at once. */
bool bulk_work(struct migdev *dev)
{
	u64 rate = READ_ONCE(dev->set[DIRTY_RATE]), now = ktime_get_ns(), pages = bulk_pages(dev), n;

	if (dev->mode == STOPPED || !pages) {
		dev->churned = now;
		return false;
	}
	/* Owed pages, times 10^9; after a long wait the device does not try to catch up on all. */
	dev->owed += rate * min(now - dev->churned, 100ull * NSEC_PER_MSEC);
	dev->churned = now;
	for (n = 0; n < SLICE && dev->owed >= NSEC_PER_SEC; n++, dev->owed -= NSEC_PER_SEC)
		churn_one(dev);
	for (n = 0; n < SLICE && dev->sweep < pages; n++)
		page_check(dev, dev->sweep++);
	return dev->owed >= NSEC_PER_SEC || dev->sweep < pages;
}

void bulk_load(struct migdev *dev, u64 page, const u8 *bytes)
{
	__le64 *words = page_at(dev, page);
	u64 old = le64_to_cpu(words[1]);

	memcpy(words, bytes, BULK_PAGE);
	dev->generations += mix(page, le64_to_cpu(words[1])) - mix(page, old);
	__clear_bit(page, dev->damaged);
}
