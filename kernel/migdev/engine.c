// SPDX-License-Identifier: GPL-2.0
/* The DMA engine: takes descriptors from the ring, writes numbered blocks, raises. */
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/log2.h>

#include "migdev.h"

#define BLOCK_MAGIC	0x4b434f4c42534d56ull
#define P2P		1u

struct descriptor {
	__le64 src, dst;
	__le32 len, flags;
	__le64 cookie;
};

static int dma_read(struct migdev *dev, u64 iova, void *to, size_t len)
{
	return vfio_dma_rw(&dev->vdev, iova, to, len, false);
}

static int dma_write(struct migdev *dev, u64 iova, void *from, size_t len)
{
	int ret = vfio_dma_rw(&dev->vdev, iova, from, len, true);

	/* Also when it failed: it may have got some way. */
	log_mark(dev, iova, len);
	return ret;
}

static u64 block_sum(const __le64 *words, unsigned int count)
{
	u64 sum = 0;

	while (count--)
		sum += le64_to_cpu(*words++);
	return sum;
}

static int carry_out(struct migdev *dev, const struct descriptor *d)
{
	u32 len = le32_to_cpu(d->len), flags = le32_to_cpu(d->flags), i;
	unsigned int flow = flags & P2P ? 1 : 0;
	__le64 *words = (__le64 *)dev->scratch, count;
	u64 number = dev->reg.blocks[flow] + 1, source, seed = number * 0x9e3779b97f4a7c15ull;
	int ret = dma_read(dev, le64_to_cpu(d->src), words, len);

	if (ret)
		return ret;
	source = block_sum(words, len / 8);
	bulk_check_some(dev, 2);
	words[0] = cpu_to_le64(BLOCK_MAGIC);
	words[1] = cpu_to_le64(number);
	words[2] = d->cookie;
	words[3] = cpu_to_le64(len | (u64)flags << 32);
	words[4] = cpu_to_le64(source);
	words[5] = cpu_to_le64(dev->set[INTEGRITY]);
	words[6] = cpu_to_le64(dev->reg.reinits);
	words[7] = 0;
	for (i = 8; i < len / 8; i++)
		words[i] = cpu_to_le64(seed ^ ((u64)i << 32 | i));
	words[7] = cpu_to_le64(block_sum(words, len / 8));
	ret = dma_write(dev, le64_to_cpu(d->dst), words, len);
	if (ret)
		return ret;
	count = cpu_to_le64(number);
	ret = dma_write(dev, dev->reg.done_addr + 8 * flow, &count, sizeof(count));
	if (ret)
		return ret;
	dev->reg.blocks[flow] = number;
	dev->reg.head++;
	interrupt_raise(dev, flow);
	return 0;
}

/* One descriptor: 1 when it was carried out, 0 when there is none to start, or why the ring stops. */
static int work(struct migdev *dev)
{
	struct registers *r = &dev->reg;
	struct descriptor d;
	u32 len, flags;
	u64 waiting;
	int ret;

	if (dev->mode == STOPPED || !r->enabled || r->ring_error)
		return 0;
	if (r->doorbell) {
		__le64 tail;

		r->doorbell = false;
		ret = dma_read(dev, r->tail_addr, &tail, sizeof(tail));
		if (ret)
			return ret;
		r->tail = le64_to_cpu(tail);
	}
	waiting = r->tail - r->head;
	if (!waiting)
		return 0;
	if (!is_power_of_2(r->ring_size) || r->ring_size < 2 || r->ring_size > 4096 || waiting > r->ring_size)
		return -EINVAL;
	ret = dma_read(dev, r->ring_base + (r->head & (r->ring_size - 1)) * sizeof(d), &d, sizeof(d));
	if (ret)
		return ret;
	len = le32_to_cpu(d.len);
	flags = le32_to_cpu(d.flags);
	if (len < 128 || len > MAX_BLOCK || len % 64 || flags & ~P2P)
		return -EINVAL;
	if (dev->mode == NO_P2P && flags & P2P)
		return 0;
	ret = carry_out(dev, &d);
	return ret ? ret : 1;
}

static int engine_run(void *data)
{
	struct migdev *dev = data;

	while (!kthread_should_stop()) {
		u64 pause = READ_ONCE(dev->set[DMA_INTERVAL_US]);
		bool more, churns;
		int ret;

		mutex_lock(&dev->lock);
		/* Before looking for work: what comes later wakes again. */
		WRITE_ONCE(dev->kicked, false);
		more = bulk_work(dev);
		ret = work(dev);
		if (ret < 0)
			dev->reg.ring_error = true;
		churns = bulk_pages(dev) && READ_ONCE(dev->set[DIRTY_RATE]) && dev->mode != STOPPED;
		mutex_unlock(&dev->lock);
		if (ret > 0 && pause)
			usleep_range(pause, pause + pause / 4 + 1);
		else if (ret || more)
			cond_resched();
		else
			wait_event_interruptible_timeout(dev->wake,
							 READ_ONCE(dev->kicked) || kthread_should_stop(),
							 churns ? msecs_to_jiffies(5) : MAX_SCHEDULE_TIMEOUT);
	}
	return 0;
}

void engine_kick(struct migdev *dev)
{
	WRITE_ONCE(dev->kicked, true);
	wake_up_interruptible(&dev->wake);
}

/* When this returns the descriptor in hand is complete and nothing in the device changes. */
void engine_quiesce(struct migdev *dev)
{
	mutex_lock(&dev->lock);
	dev->mode = STOPPED;
	mutex_unlock(&dev->lock);
}

int engine_start(struct migdev *dev)
{
	struct task_struct *task = kthread_run(engine_run, dev, "migdev");

	if (IS_ERR(task))
		return PTR_ERR(task);
	dev->engine = task;
	return 0;
}

void engine_stop(struct migdev *dev)
{
	kthread_stop(dev->engine);
	dev->engine = NULL;
}
