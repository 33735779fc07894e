package hooks

import (
	"strconv"
	"sync/atomic"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/tracectx"
)

// metrics are those of the publish path. Labels are bounded: rule names, and sets fixed here.
type metrics struct {
	publishes      [3]prometheus.Counter // by QoS
	matches        *prometheus.CounterVec
	refusals       map[reason]prometheus.Counter // of QoS 1 and 2
	drops          map[reason]prometheus.Counter // of QoS 0
	malformed      map[tracectx.Reason]prometheus.Counter
	malformedBag   map[tracectx.Reason]prometheus.Counter
	commitWait     prometheus.Histogram
	panics         *prometheus.CounterVec
	events         *eventMetrics
	wills          map[reason]prometheus.Counter
	refusedWaiting prometheus.Gauge
	refusedClosed  prometheus.Counter
}

func newMetrics(r prometheus.Registerer) *metrics {
	auto := promauto.With(r)
	m := &metrics{
		matches: auto.NewCounterVec(prometheus.CounterOpts{
			Name: "throughline_rule_matches_total",
			Help: "Publishes and events that a rule matched, by where their trace comes from: upstream (the publisher's), " +
				"new (it sent none), malformed (it sent one that could not be read).",
		}, []string{"rule", "trace"}),
		events:       newEventMetrics(auto),
		wills:        make(map[reason]prometheus.Counter),
		refusals:     make(map[reason]prometheus.Counter),
		drops:        make(map[reason]prometheus.Counter),
		malformed:    make(map[tracectx.Reason]prometheus.Counter),
		malformedBag: make(map[tracectx.Reason]prometheus.Counter),
		commitWait: auto.NewHistogram(prometheus.HistogramOpts{
			Name:    "throughline_commit_wait_seconds",
			Help:    "How long matching QoS 1 and 2 publishes waited for their records to be on disk.",
			Buckets: prometheus.ExponentialBuckets(0.0002, 2.5, 12), // 0.2 ms to 4.8 s
		}),
		panics: auto.NewCounterVec(prometheus.CounterOpts{
			Name: "throughline_hook_panics_total",
			Help: "Panics recovered in a hook.",
		}, []string{"hook"}),
		refusedWaiting: auto.NewGauge(prometheus.GaugeOpts{
			Name: "throughline_refused_connections",
			Help: "Connections whose client waits for an acknowledgement that was refused; they are closed when there is room again.",
		}),
		refusedClosed: auto.NewCounter(prometheus.CounterOpts{
			Name: "throughline_refused_connections_closed_total",
			Help: "Connections closed after a refusal so that their client sends again.",
		}),
	}
	publishes := auto.NewCounterVec(prometheus.CounterOpts{
		Name: "throughline_publishes_total", Help: "Publishes that clients were allowed to make, by QoS.",
	}, []string{"qos"})
	for qos := range m.publishes {
		m.publishes[qos] = publishes.WithLabelValues(strconv.Itoa(qos))
	}
	refusals := auto.NewCounterVec(prometheus.CounterOpts{
		Name: "throughline_publishes_refused_total",
		Help: "Publishes of QoS 1 and 2 that were not accepted, by reason.",
	}, []string{"reason"})
	wills := auto.NewCounterVec(prometheus.CounterOpts{
		Name: "throughline_wills_dropped_total",
		Help: "Wills that a rule matched and whose deliveries were lost, by reason. Their subscribers got them.",
	}, []string{"reason"})
	drops := auto.NewCounterVec(prometheus.CounterOpts{
		Name: "throughline_publishes_dropped_total",
		Help: "Publishes of QoS 0 that were not accepted, by reason: nobody is told.",
	}, []string{"reason"})
	for _, why := range reasons {
		m.wills[why] = wills.WithLabelValues(string(why))
		m.refusals[why] = refusals.WithLabelValues(string(why))
		if why != commitFailed { // which nothing of QoS 0 waits for
			m.drops[why] = drops.WithLabelValues(string(why))
		}
	}
	carriers := auto.NewCounterVec(prometheus.CounterOpts{
		Name: "throughline_carriers_malformed_total",
		Help: "Trace headers of publishes that could not be read, by header and reason. Without sw8 a new trace begins; without sw8-correlation the baggage is lost.",
	}, []string{"header", "reason"})
	for _, why := range tracectx.Reasons() {
		m.malformed[why] = carriers.WithLabelValues(tracectx.HeaderSW8, string(why))
		m.malformedBag[why] = carriers.WithLabelValues(tracectx.HeaderCorrelation, string(why))
	}
	for _, name := range guarded {
		m.panics.WithLabelValues(name)
	}
	return m
}

// refused counts a publish that was not accepted.
func (m *metrics) refused(qos byte, why reason) {
	if qos == 0 {
		m.drops[why].Inc()
		return
	}
	m.refusals[why].Inc()
}

// registerState registers what mochi and the sessions hold.
func registerState(r prometheus.Registerer, s *mqtt.Server, h *hook) {
	auto := promauto.With(r)
	gauge := func(name, help string, value func() float64) {
		auto.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	gauge("throughline_mqtt_sessions", "Sessions, those of disconnected clients included.",
		func() float64 { return float64(s.Clients.Len()) })
	gauge("throughline_mqtt_clients", "Connected clients.",
		func() float64 { return float64(s.Info.Clone().ClientsConnected) })
	gauge("throughline_mqtt_subscriptions", "Subscriptions of all sessions.",
		func() float64 { return float64(s.Info.Clone().Subscriptions) })
	gauge("throughline_mqtt_retained_messages", "Retained messages, $SYS topics among them.",
		func() float64 { return float64(h.retained.Len()) })
	counters := &h.subscribers.counters
	gauge("throughline_mqtt_messages_queued", "Messages of QoS 1 and 2 that wait for a client, offline or slow.",
		func() float64 { return float64(counters.Queued.Load()) })
	for reason, n := range map[string]*atomic.Uint64{
		"queue_full": &counters.QueueFull, "congested": &counters.Congested,
		"too_large": &counters.TooLarge, "expired": &counters.Expired,
	} {
		auto.NewCounterFunc(prometheus.CounterOpts{
			Name: "throughline_mqtt_messages_dropped_total",
			Help: "Messages to subscribers that were dropped: queue_full (too many wait for the client), congested (QoS 0, and the client " +
				"takes nothing), too_large (beyond its Maximum Packet Size), expired (their Message Expiry Interval is over).",
			ConstLabels: prometheus.Labels{"reason": reason},
		}, func() float64 { return float64(n.Load()) })
	}
}

// outcomes collects what the current rules count themselves.
type outcomes struct {
	rules             func() *rules.Set
	desc, republished *prometheus.Desc
}

func registerOutcomes(r prometheus.Registerer, set func() *rules.Set) {
	if r == nil {
		return
	}
	r.MustRegister(&outcomes{
		rules: set,
		desc: prometheus.NewDesc("throughline_rule_outcomes_total",
			"Messages and events that a rule was a candidate for, by outcome. type_mismatch, undefined_in_body, header_left_out and not_republished are counted beside the others.",
			[]string{"rule", "outcome"}, nil),
		republished: prometheus.NewDesc("throughline_rule_republished_total", "Messages that a rule published.", []string{"rule"}, nil),
	})
}

func (c *outcomes) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.desc
	ch <- c.republished
}

func (c *outcomes) Collect(ch chan<- prometheus.Metric) {
	set := c.rules()
	if set == nil {
		return
	}
	for _, rule := range set.Rules() {
		ch <- prometheus.MustNewConstMetric(c.republished, prometheus.CounterValue, float64(rule.Outcomes().Republished.Load()), rule.Name)
		rule.Outcomes().Each(func(o rules.Outcome, n uint64) {
			ch <- prometheus.MustNewConstMetric(c.desc, prometheus.CounterValue, float64(n), rule.Name, string(o))
		})
	}
}
