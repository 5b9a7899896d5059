// SPDX-License-Identifier: GPL-2.0
/* A data stream's session: who holds it, and what ends it. */
#include <linux/bitmap.h>
#include <linux/slab.h>

#include "migdev.h"

static void session_free(struct kref *kref)
{
	struct session *s = container_of(kref, struct session, kref);

	bitmap_free(s->pages);
	vfio_put_device(&s->dev->vdev);
	kfree(s);
}

void session_put(struct session *s)
{
	kref_put(&s->kref, session_free);
}

/* Ends the session: its file answers ENODEV from now on. */
void session_end(struct migdev *dev)
{
	struct session *s = dev->session;

	if (!s)
		return;
	mutex_lock(&dev->lock);
	dev->session = NULL;
	mutex_unlock(&dev->lock);
	s->dead = true;
	session_put(s);
}

/* The function's reset: RUNNING, nothing enabled, no session. Connected vectors and a log stay. */
void session_reset(struct migdev *dev)
{
	engine_quiesce(dev);
	session_end(dev);
	mutex_lock(&dev->lock);
	front_reset(dev);
	if (dev->foreign || dev->set[INTEGRITY] || dev->sweep < bulk_pages(dev))
		bulk_renew(dev);
	dev->foreign = false;
	dev->mode = RUN;
	mutex_unlock(&dev->lock);
	engine_kick(dev);
	WRITE_ONCE(dev->state, VFIO_DEVICE_STATE_RUNNING);
}

/* The fault enodev_after: once, after so many bytes, the session is gone as by a reset that the guest asked for. */
bool enodev_due(struct session *s, size_t *count)
{
	struct migdev *dev = s->dev;
	u64 after = dev->set[ENODEV_AFTER];

	if (!after || dev->struck)
		return false;
	if (s->moved >= after) {
		dev->struck = true;
		session_reset(dev);
		return true;
	}
	*count = min_t(u64, *count, after - s->moved);
	return false;
}
