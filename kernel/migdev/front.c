// SPDX-License-Identifier: GPL-2.0
/* What the guest sees: configuration space, registers and doorbell (BAR0), mailbox (BAR2). All of it trapped. */
#include <linux/uaccess.h>
#include <linux/unaligned.h>

#include "migdev.h"

enum {
	MAGIC = 0x00, CONTROL = 0x08, RING_BASE = 0x10, RING_SIZE = 0x18, TAIL_ADDR = 0x20, DONE_ADDR = 0x28,
	ACK0 = 0x30, ACK1 = 0x38, STATE_BYTES = 0x40, BLOCKS0 = 0x48, BLOCKS1 = 0x50, REINIT = 0x58, HEAD = 0x60,
	DOORBELL = 0x1000,
};

u64 region_size(u32 index)
{
	switch (index) {
	case VFIO_PCI_BAR0_REGION_INDEX:
		return BAR0_SIZE;
	case VFIO_PCI_BAR2_REGION_INDEX:
		return BAR2_SIZE;
	case VFIO_PCI_CONFIG_REGION_INDEX:
		return CONFIG_SIZE;
	default:
		return 0;
	}
}

/* Fresh registers, configuration space and mailbox. */
void front_reset(struct migdev *dev)
{
	u8 *c = dev->config, *w = dev->writable;

	memset(&dev->reg, 0, sizeof(dev->reg));
	memset(dev->mailbox, 0, BAR2_SIZE);
	memset(c, 0, CONFIG_SIZE);
	memset(w, 0, CONFIG_SIZE);
	put_unaligned_le16(0x5646, c + 0x00);
	put_unaligned_le16(0x4d53, c + 0x02);
	/* Command: memory space, bus master, SERR#, INTx disable. Status: capabilities. */
	put_unaligned_le16(0x0506, w + 0x04);
	put_unaligned_le16(0x0010, c + 0x06);
	put_unaligned_le32(0xff000001, c + 0x08);
	put_unaligned_le16(0xffff, w + 0x0c);
	put_unaligned_le32(~(BAR0_SIZE - 1), w + 0x10);
	/* BAR2: 64-bit, prefetchable. */
	c[0x18] = 0xc;
	put_unaligned_le64(~((u64)BAR2_SIZE - 1), w + 0x18);
	put_unaligned_le16(0x5646, c + 0x2c);
	put_unaligned_le16(0x0001, c + 0x2e);
	c[0x34] = 0x40;
	w[0x3c] = 0xff;
	/* MSI-X: table at 0x2000 of BAR0, pending bits at 0x3000. */
	put_unaligned_le16(0x5011, c + 0x40);
	put_unaligned_le16(VECTORS - 1, c + 0x42);
	w[0x43] = 0xc0;
	put_unaligned_le32(0x2000, c + 0x44);
	put_unaligned_le32(0x3000, c + 0x48);
	/* A vendor-specific capability of 8 bytes. */
	c[0x50] = 0x09;
	c[0x52] = 8;
}

static u64 both(u32 low, u32 high)
{
	return low | (u64)high << 32;
}

static u64 register_word(struct migdev *dev, u32 at)
{
	struct registers *r = &dev->reg;

	switch (at) {
	case MAGIC:
		return both(0x4c504d53, (u32)dev->set[VERSION] << 16);
	case CONTROL:
		return both(r->enabled, r->enabled | r->ring_error << 1 | (dev->set[INTEGRITY] ? 4 : 0));
	case RING_BASE:
		return r->ring_base;
	case RING_SIZE:
		return r->ring_size;
	case TAIL_ADDR:
		return r->tail_addr;
	case DONE_ADDR:
		return r->done_addr;
	case ACK0:
		return r->ack[0];
	case ACK1:
		return r->ack[1];
	case STATE_BYTES:
		return dev->set[STATE_SIZE];
	case BLOCKS0:
		return r->blocks[0];
	case BLOCKS1:
		return r->blocks[1];
	case HEAD:
		return r->head;
	default:
		return 0;
	}
}

static u64 *wide_register(struct registers *r, u32 at)
{
	switch (at) {
	case RING_BASE:
		return &r->ring_base;
	case TAIL_ADDR:
		return &r->tail_addr;
	case DONE_ADDR:
		return &r->done_addr;
	case ACK0:
		return &r->ack[0];
	case ACK1:
		return &r->ack[1];
	default:
		return NULL;
	}
}

static void wide_written(struct migdev *dev, u32 at)
{
	unsigned int vector = at == ACK1;

	if (at != ACK0 && at != ACK1)
		return;
	dev->reg.outstanding[vector] = false;
	interrupt_raise(dev, vector);
}

/* Half a register, or one of 4 bytes. The lock is held, so an engine that is switched off here stands still. */
static void register_write4(struct migdev *dev, u32 at, u32 value)
{
	struct registers *r = &dev->reg;
	u64 *wide = wide_register(r, at & ~7u);

	if (wide) {
		*wide = at & 4 ? both(*wide, value) : both(value, *wide >> 32);
		wide_written(dev, at & ~7u);
	} else if (at == CONTROL) {
		if (value & 1 && !r->enabled) {
			r->ring_error = false;
			r->doorbell = true;
		}
		r->enabled = value & 1;
		engine_kick(dev);
	} else if (at == RING_SIZE) {
		r->ring_size = value;
	} else if (at == REINIT && value == 1) {
		r->reinits++;
	}
}

static void register_write8(struct migdev *dev, u32 at, u64 value)
{
	u64 *wide = wide_register(&dev->reg, at);

	if (wide) {
		*wide = value;
		wide_written(dev, at);
		return;
	}
	register_write4(dev, at, value);
	register_write4(dev, at + 4, value >> 32);
}

static void bar0_read(struct migdev *dev, u32 at, u8 *to, u32 len)
{
	memset(to, 0, len);
	if (at >= DOORBELL || at % len)
		return;
	if (len == 8)
		put_unaligned_le64(register_word(dev, at), to);
	else if (len == 4)
		put_unaligned_le32(register_word(dev, at & ~7u) >> (at & 4 ? 32 : 0), to);
}

static void bar0_write(struct migdev *dev, u32 at, const u8 *from, u32 len)
{
	if (at == DOORBELL) {
		dev->reg.doorbell = true;
		engine_kick(dev);
	}
	/* MSI-X table and pending bits are emulated by the user. */
	if (at >= DOORBELL || at % len)
		return;
	if (len == 8)
		register_write8(dev, at, get_unaligned_le64(from));
	else if (len == 4)
		register_write4(dev, at, get_unaligned_le32(from));
}

static ssize_t front_rw(struct migdev *dev, char __user *buf, size_t count, loff_t *ppos, bool write)
{
	u32 index = *ppos >> REGION_SHIFT, n;
	u64 at = *ppos & ((1ull << REGION_SHIFT) - 1), size;
	size_t done = 0;
	u8 bytes[64];

	size = region_size(index);
	if (at >= size || count > size - at)
		return -EINVAL;
	while (done < count) {
		size_t len = min(count - done, sizeof(bytes));

		/* Registers are accessed in the width that was asked for, as far as it is one. */
		if (index == VFIO_PCI_BAR0_REGION_INDEX)
			len = min(len, at % 8 == 0 && len >= 8 ? 8ul : at % 4 == 0 && len >= 4 ? 4ul : 1ul);
		if (write && copy_from_user(bytes, buf + done, len))
			return done ? done : -EFAULT;
		mutex_lock(&dev->lock);
		if (index == VFIO_PCI_BAR0_REGION_INDEX) {
			if (write)
				bar0_write(dev, at, bytes, len);
			else
				bar0_read(dev, at, bytes, len);
		} else if (index == VFIO_PCI_BAR2_REGION_INDEX) {
			if (write)
				memcpy(dev->mailbox + at, bytes, len);
			else
				memcpy(bytes, dev->mailbox + at, len);
		} else {
			for (n = 0; n < len; n++) {
				u8 w = dev->writable[at + n], *c = &dev->config[at + n];

				if (write)
					*c = (*c & ~w) | (bytes[n] & w);
				else
					bytes[n] = *c;
			}
		}
		mutex_unlock(&dev->lock);
		if (!write && copy_to_user(buf + done, bytes, len))
			return done ? done : -EFAULT;
		done += len;
		at += len;
	}
	*ppos += done;
	return done;
}

ssize_t front_read(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos)
{
	return front_rw(to_migdev(vdev), buf, count, ppos, false);
}

ssize_t front_write(struct vfio_device *vdev, const char __user *buf, size_t count, loff_t *ppos)
{
	return front_rw(to_migdev(vdev), (char __user *)buf, count, ppos, true);
}
