package hooks

import (
	"log/slog"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/rules"
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

// publishWill publishes the will the way that publishes go, through the rules too, once its delay has passed, if its client may publish
// to the topic. It comes no later than the end of the session (MQTT 5, 3.1.3.2.2). Nobody waits for the disk.
func (h *hook) publishWill(cl *mqtt.Client, w *will) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("publishWill", cl, cause)
			h.metrics.wills[panicked].Inc()
		}
	}()
	if !mqtt.IsValidFilter(w.packet.TopicName, true) || !h.OnACLCheck(cl, w.packet.TopicName, true) {
		return
	}
	publish := func() {
		p := publish{h: h, cl: cl, topic: w.packet.TopicName, qos: w.packet.FixedHeader.Qos, received: time.Now(), will: true}
		defer p.end()
		why, cause := p.accept(&w.packet)
		p.settled = true
		if why != "" { // its subscribers get it all the same: the client can't send it again
			p.chain = rules.Chain{}
			h.lostWill(cl, why, cause)
		}
		p.give(&w.packet)
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
				h.metrics.wills[panicked].Inc()
			}
		}()
		publish()
	})
}

// lostWill counts and logs a will that no rule's destination gets.
func (h *hook) lostWill(cl *mqtt.Client, why reason, cause error) {
	h.metrics.wills[why].Inc()
	if suppressed, ok := h.eventLog.take("will: "+string(why), time.Now()); ok {
		h.log.Error("the deliveries of a will were dropped", slog.String("reason", string(why)), slog.String("client", cl.ID), slog.Int("suppressed", suppressed), slog.Any("error", cause))
	}
}
