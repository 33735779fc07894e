package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"time"

	"github.com/eclipse/paho.golang/autopaho"
	"github.com/eclipse/paho.golang/paho"
	mqtt3 "github.com/eclipse/paho.mqtt.golang"

	"github.com/throughline-mqtt/throughline/tracectx"
)

// vehicle is a simulated vehicle of the demo: a real MQTT client, and, if it has a
// tracer, a service of its own in the trace.
type vehicle struct {
	name   string
	about  string
	broker string          // host:port
	tracer tracectx.Tracer // nil: a vehicle that knows nothing of traces
	client vehicleClient
}

// vehicleClient publishes at QoS 1 and returns nil once the broker has acknowledged.
// It puts the carrier where its protocol has a place for it.
type vehicleClient interface {
	publish(ctx context.Context, topic string, t telemetry, c tracectx.Carrier) error
	close()
}

// telemetry is what the demo's vehicles send.
type telemetry struct {
	VIN         string  `json:"vin"`
	Seq         int     `json:"seq"`
	Decel       float64 `json:"decel"` // m/s2
	SW8         string  `json:"sw8,omitempty"`
	Correlation string  `json:"sw8-correlation,omitempty"`
}

// send publishes one message, in a trace of the vehicle's own if it has a tracer.
func (v *vehicle) send(ctx context.Context, seq int, decel float64) error {
	topic := "fleet/" + v.name + "/telemetry"
	t := telemetry{VIN: v.name, Seq: seq, Decel: decel}
	if v.tracer == nil {
		return v.client.publish(ctx, topic, t, tracectx.Carrier{})
	}
	drive := v.tracer.StartLocal(tracectx.SpanOptions{Operation: "drive/brake"})
	defer drive.End()
	out := drive.StartExit(tracectx.SpanOptions{Operation: "mqtt/publish", Peer: v.broker, Layer: tracectx.LayerRPCFramework})
	defer out.End()
	out.Tag("mq.topic", topic)
	err := v.client.publish(ctx, topic, t, out.Context().Carrier())
	if err != nil {
		out.Error(err.Error())
	}
	return err
}

// mqtt311 is an MQTT 3.1.1 client: it has no user properties, so the carrier goes into the payload.
type mqtt311 struct{ c mqtt3.Client }

func dialMQTT311(ctx context.Context, broker, clientID string) (*mqtt311, error) {
	o := mqtt3.NewClientOptions().AddBroker("tcp://" + broker).SetClientID(clientID).
		SetProtocolVersion(4).SetConnectTimeout(5 * time.Second).SetOrderMatters(false)
	c := mqtt3.NewClient(o)
	if err := waitToken(ctx, c.Connect()); err != nil {
		return nil, fmt.Errorf("connect vehicle %s: %w", clientID, err)
	}
	return &mqtt311{c}, nil
}

func (m *mqtt311) publish(ctx context.Context, topic string, t telemetry, c tracectx.Carrier) error {
	t.SW8, t.Correlation = c.SW8, c.Correlation
	payload, err := json.Marshal(t)
	if err != nil {
		return err
	}
	return waitToken(ctx, m.c.Publish(topic, 1, false, payload))
}

func (m *mqtt311) close() { m.c.Disconnect(250) }

func waitToken(ctx context.Context, t mqtt3.Token) error {
	select {
	case <-t.Done():
		return t.Error()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// mqtt5 is an MQTT 5 client: the carrier goes into user properties.
type mqtt5 struct{ c *autopaho.ConnectionManager }

func dialMQTT5(ctx context.Context, broker, clientID string) (*mqtt5, error) {
	c, err := autopaho.NewConnection(context.WithoutCancel(ctx), autopaho.ClientConfig{
		ServerUrls:                    []*url.URL{{Scheme: "mqtt", Host: broker}},
		KeepAlive:                     20,
		CleanStartOnInitialConnection: true,
		ConnectTimeout:                5 * time.Second,
		ClientConfig:                  paho.ClientConfig{ClientID: clientID},
	})
	if err != nil {
		return nil, fmt.Errorf("connect vehicle %s: %w", clientID, err)
	}
	if err := c.AwaitConnection(ctx); err != nil {
		return nil, fmt.Errorf("connect vehicle %s: %w", clientID, err)
	}
	return &mqtt5{c}, nil
}

func (m *mqtt5) publish(ctx context.Context, topic string, t telemetry, c tracectx.Carrier) error {
	payload, err := json.Marshal(t)
	if err != nil {
		return err
	}
	props := &paho.PublishProperties{ContentType: "application/json"}
	if c.SW8 != "" {
		props.User.Add(tracectx.HeaderSW8, c.SW8)
	}
	if c.Correlation != "" {
		props.User.Add(tracectx.HeaderCorrelation, c.Correlation)
	}
	_, err = m.c.Publish(ctx, &paho.Publish{QoS: 1, Topic: topic, Payload: payload, Properties: props})
	return err
}

func (m *mqtt5) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := m.c.Disconnect(ctx); err != nil {
		slog.Debug("disconnect vehicle", "error", err)
	}
}
