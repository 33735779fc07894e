package hooks

import (
	"sync"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/rules"
)

// republish gives a message that a rule has made of a publish or an event to its subscribers. Rules have run on it already, and what
// they owe is stored. Nobody has published it as far as No Local goes, and no client's right to publish to its topic is asked for. A
// panic stays here: the publish is accepted, and its acknowledgement goes out. It doesn't block.
func (h *hook) republish(cl *mqtt.Client, by *rules.Rule, m *rules.Message) (pause time.Duration) {
	defer func() {
		if cause := recover(); cause != nil {
			h.panicked("republish", cl, cause)
			pause = 0
		}
	}()
	pk := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: m.QoS, Retain: m.Retain},
		TopicName:   m.Topic,
		Payload:     m.Payload,
	}
	for _, u := range m.UserProperties {
		pk.Properties.User = append(pk.Properties.User, packets.UserProperty{Key: u[0], Val: u[1]})
	}
	by.Outcomes().Republished.Add(1)
	return h.deliver("", &pk, m.Timestamp)
}

// republishAll republishes what the chain of a publish or event has made. The client is nil for an event.
func (h *hook) republishAll(cl *mqtt.Client, chain *rules.Chain) (pause time.Duration) {
	for _, m := range chain.Published {
		pause = max(pause, h.republish(cl, chain.Matches[m.By].Rule, m.Message))
	}
	return pause
}

// refusedChains remembers what the log has been told of what rules were kept from: a line for each rule and each cause, until the rules
// are others. It is safe for concurrent use.
type refusedChains struct {
	mu         sync.Mutex
	generation string
	told       map[refusedChain]bool
}

type refusedChain struct {
	rule string
	why  rules.Outcome
}

// first reports whether it is asked for the first time.
func (r *refusedChains) first(generation string, c refusedChain) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.generation != generation {
		r.generation, r.told = generation, nil
	}
	if r.told[c] {
		return false
	}
	if r.told == nil {
		r.told = make(map[refusedChain]bool)
	}
	r.told[c] = true
	return true
}

// tellRefused logs what rules were kept from.
func (h *hook) tellRefused(set *rules.Set, client string, refused []rules.Refusal) {
	for _, r := range refused {
		if h.refused.first(set.Generation(), refusedChain{r.Rule.Name, r.Why}) {
			h.log.Warn("a rule was kept from something; from now on this is only counted", "rule", r.Rule.Name, "outcome", string(r.Why), "cause", r.Text, "client", client)
		}
	}
}
