// SPDX-License-Identifier: GPL-2.0
/* MSI-X vectors: eventfds, masks, and the rule that a vector is raised once until it is acknowledged. */
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "migdev.h"

static void interrupt_send(struct migdev *dev, unsigned int vector)
{
	bool ready = dev->events[vector] && !dev->masked[vector];

	dev->reg.unsent[vector] = !ready;
	if (ready)
		eventfd_signal(dev->events[vector]);
}

void interrupt_raise(struct migdev *dev, unsigned int vector)
{
	struct registers *r = &dev->reg;

	if (dev->mode == STOPPED || r->outstanding[vector] || r->blocks[vector] <= r->ack[vector])
		return;
	r->outstanding[vector] = true;
	r->raises[vector]++;
	interrupt_send(dev, vector);
}

/* Sends what found the vector masked or not connected; in STOP nothing is sent. */
void interrupt_flush(struct migdev *dev, unsigned int vector)
{
	if (dev->mode != STOPPED && dev->reg.unsent[vector])
		interrupt_send(dev, vector);
}

static void connect(struct migdev *dev, unsigned int vector, struct eventfd_ctx *event)
{
	if (dev->events[vector])
		eventfd_ctx_put(dev->events[vector]);
	dev->events[vector] = event;
	interrupt_flush(dev, vector);
}

void interrupts_disconnect(struct migdev *dev)
{
	unsigned int vector;

	for (vector = 0; vector < VECTORS; vector++) {
		connect(dev, vector, NULL);
		dev->masked[vector] = false;
	}
}

long interrupts_info(struct migdev *dev, unsigned long arg)
{
	struct vfio_irq_info info;
	size_t size = offsetofend(struct vfio_irq_info, count);

	if (copy_from_user(&info, (void __user *)arg, size))
		return -EFAULT;
	if (info.argsz < size || info.index >= VFIO_PCI_NUM_IRQS)
		return -EINVAL;
	info.flags = 0;
	info.count = 0;
	if (info.index == VFIO_PCI_MSIX_IRQ_INDEX) {
		info.flags = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE;
		info.count = VECTORS;
	}
	return copy_to_user((void __user *)arg, &info, size) ? -EFAULT : 0;
}

static long connect_all(struct migdev *dev, const struct vfio_irq_set *set, const s32 *fds)
{
	struct eventfd_ctx *events[VECTORS] = {};
	u64 possible = READ_ONCE(dev->set[IRQS_POSSIBLE]);
	u32 i;

	/* As vfio-pci where the host has fewer vectors: none is enabled, and their number is the answer. */
	if (possible && set->start + set->count > possible)
		return possible;
	/* All or none. */
	for (i = 0; i < set->count; i++) {
		if (fds[i] < 0)
			continue;
		events[i] = eventfd_ctx_fdget(fds[i]);
		if (IS_ERR(events[i])) {
			long ret = PTR_ERR(events[i]);

			while (i--)
				if (events[i])
					eventfd_ctx_put(events[i]);
			return ret;
		}
	}
	for (i = 0; i < set->count; i++)
		connect(dev, set->start + i, events[i]);
	return 0;
}

static long act(struct migdev *dev, const struct vfio_irq_set *set, const u8 *data)
{
	u32 what = set->flags & VFIO_IRQ_SET_ACTION_TYPE_MASK, i;
	u32 kind = set->flags & VFIO_IRQ_SET_DATA_TYPE_MASK;

	if (kind == VFIO_IRQ_SET_DATA_EVENTFD)
		return what == VFIO_IRQ_SET_ACTION_TRIGGER ? connect_all(dev, set, (const s32 *)data) : -EINVAL;
	if (kind == VFIO_IRQ_SET_DATA_NONE && what == VFIO_IRQ_SET_ACTION_TRIGGER && !set->count) {
		interrupts_disconnect(dev);
		return 0;
	}
	for (i = 0; i < set->count; i++) {
		u32 vector = set->start + i;

		if (kind == VFIO_IRQ_SET_DATA_BOOL && !data[i])
			continue;
		switch (what) {
		case VFIO_IRQ_SET_ACTION_MASK:
			dev->masked[vector] = true;
			break;
		case VFIO_IRQ_SET_ACTION_UNMASK:
			dev->masked[vector] = false;
			interrupt_flush(dev, vector);
			break;
		default:
			if (dev->events[vector])
				eventfd_signal(dev->events[vector]);
		}
	}
	return 0;
}

long interrupts_set(struct migdev *dev, unsigned long arg)
{
	size_t head = offsetofend(struct vfio_irq_set, count), size = 0;
	struct vfio_irq_set set;
	u8 *data = NULL;
	long ret;

	if (copy_from_user(&set, (void __user *)arg, head))
		return -EFAULT;
	ret = vfio_set_irqs_validate_and_prepare(&set, set.index == VFIO_PCI_MSIX_IRQ_INDEX ? VECTORS : 0,
						 VFIO_PCI_NUM_IRQS, &size);
	if (ret)
		return ret;
	if (set.index != VFIO_PCI_MSIX_IRQ_INDEX)
		return -EINVAL;
	if (size) {
		data = memdup_user((u8 __user *)arg + head, size);
		if (IS_ERR(data))
			return PTR_ERR(data);
	}
	mutex_lock(&dev->lock);
	ret = act(dev, &set, data);
	mutex_unlock(&dev->lock);
	kfree(data);
	return ret;
}
