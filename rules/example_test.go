package rules_test

import (
	"fmt"
	"log"
	"os"
	"time"

	"github.com/throughline-mqtt/throughline/rules"
)

// What a broker does: load once, then for each message find the candidates of
// its topic and match them.
func Example() {
	set, problems := rules.Load([]string{"../testdata/rules"}, rules.LoadOptions{})
	if err := rules.Print(os.Stdout, problems); err != nil {
		log.Fatal(err)
	}
	payload, err := os.ReadFile("../testdata/payloads/telemetry.json")
	if err != nil {
		log.Fatal(err)
	}
	m := &rules.Message{ClientID: "v7", Topic: "fleet/v7/telemetry", Payload: payload, QoS: 1, Timestamp: time.UnixMilli(1700000000000)}
	for _, match := range set.Run(set.Candidates(nil, m.Topic), m, nil).Matches {
		for _, d := range match.Deliveries {
			fmt.Printf("%s -> %s, id %q\n", match.Rule.Name, d.Destination, d.ID)
			fmt.Printf("  %s\n", d.Body)
		}
	}
	// Output:
	// battery-low -> notification-center, id ""
	//   {"event":"battery-low","vin":"WVWZZZ1JZXW000001","percent":12,"level":"low"}
	// battery-low -> audit, id ""
	//   {"vin":"WVWZZZ1JZXW000001","percent":12,"level":"low"}
	// hard-brake -> notification-center, id "WVWZZZ1JZXW000001-1700000000000"
	//   {"event":"hard-brake","vin":"WVWZZZ1JZXW000001","decel":7.1,"text":"WVWZZZ1JZXW000001 braked at 7.1 m/s2"}
}

// One statement on one event, as `broker eval` runs it.
func ExampleEval() {
	fmt.Printf("%s\n", rules.Eval([]byte(`{"sql": "SELECT payload.n + 1 AS n FROM \"t/#\"", "event": {"topic": "t/1", "payload": "{\"n\": 9007199254740993}"}}`), nil))
	fmt.Printf("%s\n", rules.Eval([]byte(`{"sql": "SELECT upperr(clientid) AS c FROM \"t\"", "event": {}}`), nil))
	// Output:
	// {"matched":true,"rows":[{"n":9007199254740994}]}
	// {"error":"parse","message":"1:8: unknown function \"upperr\""}
}
