package hooks

import (
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/tracectx"
)

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
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("publishWill", cl, cause)
		}
	}()
	if !mqtt.IsValidFilter(w.packet.TopicName, true) || !h.OnACLCheck(cl, w.packet.TopicName, true) {
		return
	}
	publish := func() {
		now := time.Now()
		from := origin{client: true}
		if h.wantsOrigin() {
			from.message = h.messageOf(cl, &w.packet, now)
		}
		if _, taken := h.deliverFrom(from, cl.ID, &w.packet, now); !taken && from.message != nil {
			h.noSubscribers(cl, from.message, tracectx.Context{})
		}
	}
	delay := min(w.delay, time.Duration(cl.Properties.Props.SessionExpiryInterval)*time.Second)
	if delay == 0 {
		publish()
		return
	}
	if now, ok := h.server.mochi.Clients.Get(cl.ID); !ok || now != cl {
		return // the client is back already
	}
	h.wills.after(delay, cl.ID, func() {
		defer func() {
			if cause := recover(); cause != nil {
				h.panicked("publishWill", cl, cause)
			}
		}()
		publish()
	})
}
