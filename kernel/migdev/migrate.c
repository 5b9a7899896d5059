// SPDX-License-Identifier: GPL-2.0
/* The migration state machine, arc by arc, and the faults that are about arcs. */
#include <linux/anon_inodes.h>
#include <linux/bitmap.h>
#include <linux/delay.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/slab.h>

#include "migdev.h"

static struct file *session_open(struct migdev *dev, bool saving)
{
	struct session *s = kzalloc(sizeof(*s), GFP_KERNEL);
	struct file *file;

	if (!s)
		return ERR_PTR(-ENOMEM);
	kref_init(&s->kref);
	s->dev = dev;
	get_device(&dev->vdev.device);
	s->saving = saving;
	s->pages = bitmap_zalloc(bulk_pages(dev) + 1, GFP_KERNEL_ACCOUNT);
	if (!s->pages) {
		session_put(s);
		return ERR_PTR(-ENOMEM);
	}
	file = anon_inode_getfile("migdev", saving ? &saving_fops : &loading_fops, s, saving ? O_RDONLY : O_WRONLY);
	if (IS_ERR(file)) {
		session_put(s);
		return file;
	}
	stream_open(file->f_inode, file);
	kref_get(&s->kref);
	/* The engine looks at it. */
	mutex_lock(&dev->lock);
	dev->session = s;
	mutex_unlock(&dev->lock);
	return file;
}

static void start(struct migdev *dev, enum mode mode)
{
	unsigned int vector;

	mutex_lock(&dev->lock);
	dev->mode = mode;
	/* The tail may have moved without a doorbell that reached this device. */
	dev->reg.doorbell = true;
	for (vector = 0; vector < VECTORS; vector++) {
		interrupt_flush(dev, vector);
		interrupt_raise(dev, vector);
	}
	mutex_unlock(&dev->lock);
	engine_kick(dev);
}

static struct file *take_arc(struct migdev *dev, u32 from, u32 to)
{
	struct file *file = NULL;
	int ret;

#define ARC(a, b) ((a) << 8 | (b))
	switch (ARC(from, to)) {
	case ARC(VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_RUNNING_P2P):
	case ARC(VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_PRE_COPY_P2P):
	case ARC(VFIO_DEVICE_STATE_RUNNING_P2P, VFIO_DEVICE_STATE_RUNNING):
	case ARC(VFIO_DEVICE_STATE_PRE_COPY_P2P, VFIO_DEVICE_STATE_PRE_COPY):
		mutex_lock(&dev->lock);
		dev->mode = to == VFIO_DEVICE_STATE_RUNNING || to == VFIO_DEVICE_STATE_PRE_COPY ? RUN : NO_P2P;
		mutex_unlock(&dev->lock);
		engine_kick(dev);
		return NULL;
	case ARC(VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_PRE_COPY):
	case ARC(VFIO_DEVICE_STATE_RUNNING_P2P, VFIO_DEVICE_STATE_PRE_COPY_P2P):
		return session_open(dev, true);
	case ARC(VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_RUNNING):
	case ARC(VFIO_DEVICE_STATE_PRE_COPY_P2P, VFIO_DEVICE_STATE_RUNNING_P2P):
	case ARC(VFIO_DEVICE_STATE_STOP_COPY, VFIO_DEVICE_STATE_STOP):
		session_end(dev);
		return NULL;
	case ARC(VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_STOP):
	case ARC(VFIO_DEVICE_STATE_RUNNING_P2P, VFIO_DEVICE_STATE_STOP):
		engine_quiesce(dev);
		return NULL;
	case ARC(VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_STOP_COPY):
	case ARC(VFIO_DEVICE_STATE_PRE_COPY_P2P, VFIO_DEVICE_STATE_STOP_COPY):
		engine_quiesce(dev);
		dev->session->stopped = true;
		return NULL;
	case ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_STOP_COPY):
		file = session_open(dev, true);
		if (!IS_ERR(file))
			dev->session->stopped = true;
		return file;
	case ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RUNNING):
		start(dev, RUN);
		return NULL;
	case ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RUNNING_P2P):
		start(dev, NO_P2P);
		return NULL;
	case ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RESUMING):
		file = session_open(dev, false);
		if (!IS_ERR(file)) {
			dev->foreign = true;
			mutex_lock(&dev->lock);
			memset(dev->mailbox, 0, BAR2_SIZE);
			mutex_unlock(&dev->lock);
		}
		return file;
	case ARC(VFIO_DEVICE_STATE_RESUMING, VFIO_DEVICE_STATE_STOP):
		ret = loading_finish(dev, dev->session);
		if (ret)
			return ERR_PTR(ret);
		session_end(dev);
		dev->foreign = false;
		return NULL;
	default:
		return ERR_PTR(-EINVAL);
	}
}

/* Lets the faults strike that are about arcs. Arcs are counted from 1 since `arcs` was last written. */
static int scripted(struct migdev *dev)
{
	u64 arc = dev->set[ARCS] + 1;

	WRITE_ONCE(dev->set[ARCS], arc);
	/* Outside of the inner lock: the device goes on meanwhile. */
	if (dev->set[ARC_DELAY_MS])
		msleep(dev->set[ARC_DELAY_MS]);
	if (arc == dev->set[FAIL_ARC])
		return -(int)dev->set[FAIL_ERRNO];
	if (arc == dev->set[ERROR_ARC]) {
		engine_quiesce(dev);
		session_end(dev);
		WRITE_ONCE(dev->state, VFIO_DEVICE_STATE_ERROR);
		return -EIO;
	}
	return 0;
}

static struct file *set_state(struct vfio_device *vdev, enum vfio_device_mig_state to)
{
	struct migdev *dev = to_migdev(vdev);
	struct file *file = NULL;

	mutex_lock(&dev->mig);
	/* The core warns when asked for a way out of ERROR: there is only a reset. */
	if (dev->state == VFIO_DEVICE_STATE_ERROR)
		file = ERR_PTR(-EIO);
	while (!IS_ERR(file) && dev->state != to) {
		enum vfio_device_mig_state next;
		int ret = vfio_mig_get_next_state(vdev, dev->state, to, &next);

		if (!ret)
			ret = scripted(dev);
		if (ret) {
			file = ERR_PTR(ret);
			break;
		}
		file = take_arc(dev, dev->state, next);
		if (IS_ERR(file))
			break;
		WRITE_ONCE(dev->state, next);
		/* Only the last arc of a way opens a file. */
		if (WARN_ON(file && next != to)) {
			fput(file);
			file = ERR_PTR(-EINVAL);
		}
	}
	mutex_unlock(&dev->mig);
	return file;
}

/* Answers at once, also while an arc is under way. */
static int get_state(struct vfio_device *vdev, enum vfio_device_mig_state *state)
{
	*state = READ_ONCE(to_migdev(vdev)->state);
	return 0;
}

static int get_data_size(struct vfio_device *vdev, unsigned long *size)
{
	struct migdev *dev = to_migdev(vdev);

	mutex_lock(&dev->mig);
	mutex_lock(&dev->lock);
	*size = saving_left(dev, dev->session && dev->session->saving ? dev->session : NULL);
	mutex_unlock(&dev->lock);
	*size = *size * dev->set[SIZE_PERCENT] / 100;
	mutex_unlock(&dev->mig);
	return 0;
}

const struct vfio_migration_ops migdev_mig_ops = {
	.migration_set_state = set_state,
	.migration_get_state = get_state,
	.migration_get_data_size = get_data_size,
};
