package hooks

import (
	"sync"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

// wills are those that wait for their delay to pass [MQTT-3.1.3-9].
type wills struct {
	mu     sync.Mutex
	closed bool
	due    map[string]*delayed // by client identifier
}

type delayed struct {
	timer   *time.Timer
	publish func()
}

func newWills() *wills { return &wills{due: make(map[string]*delayed)} }

// after calls publish after the delay, unless the will is dropped, or its session ends, before that.
func (w *wills) after(delay time.Duration, id string, publish func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	d := &delayed{publish: publish}
	d.timer = time.AfterFunc(delay, func() {
		if w.take(id, d) {
			publish()
		}
	})
	w.due[id] = d
}

// take takes the client's will, if it is d, for the caller to publish.
func (w *wills) take(id string, d *delayed) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if d == nil || w.due[id] != d {
		return false
	}
	d.timer.Stop()
	delete(w.due, id)
	return true
}

// connected settles the will of a client that is back: its session has been resumed, or has ended.
func (w *wills) connected(id string, resumed bool) {
	w.mu.Lock()
	d := w.due[id]
	w.mu.Unlock()
	if w.take(id, d) && !resumed {
		d.publish()
	}
}

// close drops all, and those to come.
func (w *wills) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	for _, d := range w.due {
		d.timer.Stop()
	}
	clear(w.due)
}

// will is a client's, as its CONNECT had it.
type will struct {
	packet packets.Packet // the PUBLISH that it becomes
	delay  time.Duration
}

func willOf(connect *packets.Packet) *will {
	w := &connect.Connect
	if !w.WillFlag {
		return nil
	}
	return &will{
		packet: packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: w.WillQos, Retain: w.WillRetain},
			TopicName:   w.WillTopic,
			Payload:     w.WillPayload,
			Properties:  w.WillProperties,
		},
		delay: time.Duration(w.WillProperties.WillDelayInterval) * time.Second,
	}
}

// publishWill publishes the will the way that publishes go, once its delay has passed, if its client may publish to the topic.
// It comes no later than the end of the session (MQTT 5, 3.1.3.2.2).
func (h *hook) publishWill(cl *mqtt.Client, w *will) {
	if !mqtt.IsValidFilter(w.packet.TopicName, true) || !h.OnACLCheck(cl, w.packet.TopicName, true) {
		return
	}
	delay := min(w.delay, time.Duration(cl.Properties.Props.SessionExpiryInterval)*time.Second)
	if delay == 0 {
		h.deliver(cl.ID, &w.packet, time.Now())
		return
	}
	h.wills.after(delay, cl.ID, func() {
		defer func() {
			if cause := recover(); cause != nil {
				h.panicked("publishWill", cl, cause)
			}
		}()
		h.deliver(cl.ID, &w.packet, time.Now())
	})
}
