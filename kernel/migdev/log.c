// SPDX-License-Identifier: GPL-2.0
/* The log of DMA writes: the pages that were written, exactly, until they are reported. */
#include <linux/interval_tree.h>
#include <linux/iova_bitmap.h>
#include <linux/log2.h>
#include <linux/slab.h>

#include "migdev.h"

#define LOG_SHIFT_MIN 12
#define LOG_SHIFT_MAX 21

static bool log_wanted(struct migdev *dev, u64 first, u64 last)
{
	unsigned int i;

	for (i = 0; i < dev->log_count; i++)
		if (first <= dev->log_ranges[i].last && last >= dev->log_ranges[i].first)
			return true;
	return false;
}

/* Notes a write. Called after it, so that a report in between leaves the page to the next one. */
void log_mark(struct migdev *dev, u64 iova, u64 len)
{
	u64 omit = READ_ONCE(dev->set[LOG_OMIT_EVERY]);
	u64 page, last;

	mutex_lock(&dev->log_lock);
	if (dev->logging) {
		last = (iova + len - 1) >> dev->log_shift;
		for (page = iova >> dev->log_shift; page <= last; page++) {
			u64 start = max(page << dev->log_shift, iova);
			u64 end = min(((page + 1) << dev->log_shift) - 1, iova + len - 1);

			if (!log_wanted(dev, start, end) || (omit && page % omit == 0))
				continue;
			if (xa_is_err(xa_store(&dev->log, page, xa_mk_value(1), GFP_KERNEL)))
				dev->log_broken = true;
		}
	}
	mutex_unlock(&dev->log_lock);
}

static void log_clear(struct migdev *dev)
{
	xa_destroy(&dev->log);
	kfree(dev->log_ranges);
	dev->log_ranges = NULL;
	dev->log_count = 0;
	dev->logging = false;
	dev->log_broken = false;
}

void log_end(struct migdev *dev)
{
	mutex_lock(&dev->log_lock);
	log_clear(dev);
	mutex_unlock(&dev->log_lock);
}

static int log_start(struct vfio_device *vdev, struct rb_root_cached *ranges, u32 count, u64 *page_size)
{
	struct migdev *dev = to_migdev(vdev);
	struct rb_node *node;
	int ret = 0;

	if (!is_power_of_2(*page_size))
		return -EINVAL;
	mutex_lock(&dev->log_lock);
	if (dev->logging) {
		ret = -EINVAL;
		goto out;
	}
	dev->log_ranges = kcalloc(count, sizeof(*dev->log_ranges), GFP_KERNEL);
	if (!dev->log_ranges) {
		ret = -ENOMEM;
		goto out;
	}
	for (node = rb_first_cached(ranges); node && dev->log_count < count; node = rb_next(node)) {
		struct interval_tree_node *range = rb_entry(node, struct interval_tree_node, rb);

		dev->log_ranges[dev->log_count].first = range->start;
		dev->log_ranges[dev->log_count++].last = range->last;
	}
	dev->log_shift = clamp(ilog2(*page_size), LOG_SHIFT_MIN, LOG_SHIFT_MAX);
	*page_size = 1ull << dev->log_shift;
	dev->logging = true;
out:
	mutex_unlock(&dev->log_lock);
	return ret;
}

static int log_stop(struct vfio_device *vdev)
{
	log_end(to_migdev(vdev));
	return 0;
}

static int log_report(struct vfio_device *vdev, unsigned long iova, unsigned long length, struct iova_bitmap *dirty)
{
	struct migdev *dev = to_migdev(vdev);
	unsigned long last = iova + length - 1, index;
	void *entry;
	int ret = 0;

	if (!length)
		return 0;
	mutex_lock(&dev->log_lock);
	if (!dev->logging)
		ret = -EINVAL;
	else if (dev->log_broken)
		ret = -EIO;
	else
		xa_for_each_range(&dev->log, index, entry, iova >> dev->log_shift, last >> dev->log_shift) {
			unsigned long start = index << dev->log_shift;
			unsigned long end = start + (1ul << dev->log_shift) - 1;

			iova_bitmap_set(dirty, max(start, iova), min(end, last) - max(start, iova) + 1);
			/* A page that is only partly in the range is reported and kept. */
			if (start >= iova && end <= last)
				xa_erase(&dev->log, index);
		}
	mutex_unlock(&dev->log_lock);
	return ret;
}

const struct vfio_log_ops migdev_log_ops = {
	.log_start = log_start,
	.log_stop = log_stop,
	.log_read_and_clear = log_report,
};
